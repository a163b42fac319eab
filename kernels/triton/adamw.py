"""adamw_step_ in Triton: every parameter in one launch, found through a table of addresses.

The arrays of a parameter are cut into chunks; a program takes one, and looks up in the table whose
it is. With clipping, the norm of all gradients is made first, by one number per chunk and one
program that adds them up: nothing waits on the host for it. Without, it comes with the update.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.adamw_table import CHUNK, COLUMNS, OP, Step

NUM_WARPS = 4
BLOCK = 8 * 32 * NUM_WARPS  # elements a program handles at once: 8 for each of its threads
TAIL = tl.constexpr(16)  # elements; a chunk is a multiple of it and a tail
# One for each thread: fewer would be loaded by several threads, and stored by one of them while
# others may still have to load.
TAIL_BLOCK = tl.constexpr(32 * NUM_WARPS)
FINAL_BLOCK = 1024

# Columns of the table, as COLUMNS names them.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, PEAK, MASTER, COUNT, FIRST, KIND = map(tl.constexpr, range(9))
GRAD_FACTOR, KEEP, L2, RATE1, BETA2, RATE2, STEP_SIZE, ROOT_SCALE, EPS = map(
    tl.constexpr, range(9, 18)
)


@triton.jit
def _array(table_ptr, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An array of the parameter whose row of the table this is."""
    address = tl.load(table_ptr + column)
    if DTYPE == 0:
        ptr = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == 1:
        ptr = address.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == 2:
        ptr = address.to(tl.pointer_type(tl.float16))
    else:
        ptr = address.to(tl.pointer_type(tl.float64))
    return tl.multiple_of(ptr, ALIGNED)


@triton.jit
def _numbers(table_ptr, WIDE: tl.constexpr):
    """The numbers of the formula, GRAD_FACTOR to EPS; float64 in the table, which is of int64."""
    numbers = ()
    for column in tl.static_range(GRAD_FACTOR, EPS + 1):
        number = tl.load(table_ptr + column).to(tl.float64, bitcast=True)
        numbers = numbers + (number.to(WIDE),)  # noqa: RUF005 (Triton knows no unpacking)
    return numbers


@triton.jit
def _squares(g):
    """The sum of squares, in float64: float32 would overflow at 2e19 and lose small gradients."""
    wide = g.to(tl.float64)
    return tl.sum(wide * wide, axis=0)


@triton.jit
def _update(arrays, numbers, clip, offs, mask, HAS_MASTER: tl.constexpr, HAS_PEAK: tl.constexpr):
    """One step of the elements `offs` of a parameter; the sum of their squared gradients."""
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, peak_ptr, p_ptr = arrays
    grad_factor, keep, l2, rate1, beta2, rate2, step_size, root_scale, eps = numbers
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(keep.dtype)
    m = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(keep.dtype)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(keep.dtype)
    squares = _squares(g)
    g = p * l2 + g.to(keep.dtype) * (grad_factor * clip.to(keep.dtype))
    m += (g - m) * rate1
    v = v * beta2 + g * g * rate2
    tl.store(exp_avg_ptr + offs, m.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    if HAS_PEAK:
        before = tl.load(peak_ptr + offs, mask=mask, other=0.0).to(keep.dtype)
        v = tl.where(v < before, before, v)  # a nan in v stays visible
        tl.store(peak_ptr + offs, v.to(peak_ptr.dtype.element_ty), mask=mask)
    p = p * keep - step_size * m / (tl.sqrt(v) * root_scale + eps)
    if HAS_MASTER:
        tl.store(p_ptr + offs, p, mask=mask)
    tl.store(param_ptr + offs, p.to(param_ptr.dtype.element_ty), mask=mask)
    return squares


@triton.jit
def _update_chunk(
    table_ptr, clip, begin, whole, end,
    KINDS: tl.constexpr, WHICH: tl.constexpr, HAS_PEAK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_update of a parameter's elements [begin, end).

    KINDS[WHICH] is (dtype of parameter, gradient, moments, has a master, the alignment of each).
    """
    HAS_MASTER: tl.constexpr = KINDS[WHICH][3]
    param_ptr = _array(table_ptr, PARAM, KINDS[WHICH][0], KINDS[WHICH][4])
    arrays = (
        param_ptr,
        _array(table_ptr, GRAD, KINDS[WHICH][1], KINDS[WHICH][5]),
        _array(table_ptr, EXP_AVG, KINDS[WHICH][2], KINDS[WHICH][6]),
        _array(table_ptr, EXP_AVG_SQ, KINDS[WHICH][2], KINDS[WHICH][6]),
        _array(table_ptr, PEAK, KINDS[WHICH][2], KINDS[WHICH][6]),
        _array(table_ptr, MASTER, 0, KINDS[WHICH][7]) if HAS_MASTER else param_ptr,
    )
    numbers = _numbers(table_ptr, tl.float64 if KINDS[WHICH][0] == 3 else tl.float32)
    total = tl.zeros((), tl.float64)
    for at in range(begin, whole, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        total += _update(arrays, numbers, clip, offs, offs < whole, HAS_MASTER, HAS_PEAK)
    if whole < end:
        offs = whole + tl.arange(0, TAIL_BLOCK)
        total += _update(arrays, numbers, clip, offs, offs < end, HAS_MASTER, HAS_PEAK)
    return total


@triton.jit
def _chunk(table_ptr, owner_ptr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """The row of the table of this program's parameter, and its elements: [begin, end), of which
    those up to `whole` can be read 16 at a time.
    """
    chunk = tl.program_id(0)
    table_ptr += tl.load(owner_ptr + chunk).to(tl.int64) * COLUMNS
    begin = (chunk - tl.load(table_ptr + FIRST)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(table_ptr + COUNT))
    return table_ptr, begin, end // TAIL * TAIL, end


@triton.jit
def adamw_norm_kernel(
    table_ptr, owner_ptr, partial_ptr,
    KINDS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[chunk] = the sum of the squared gradients of the chunk."""
    table_ptr, begin, whole, end = _chunk(table_ptr, owner_ptr, COLUMNS, CHUNK)
    kind = tl.load(table_ptr + KIND)
    total = tl.zeros((), tl.float64)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            grad_ptr = _array(table_ptr, GRAD, KINDS[i][1], KINDS[i][5])
            for at in range(begin, whole, BLOCK):
                offs = at + tl.arange(0, BLOCK)
                total += _squares(tl.load(grad_ptr + offs, mask=offs < whole, other=0.0))
            if whole < end:
                offs = whole + tl.arange(0, TAIL_BLOCK)
                total += _squares(tl.load(grad_ptr + offs, mask=offs < end, other=0.0))
    tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["n_chunks"])
def adamw_final_kernel(
    partial_ptr, norm_ptr, clip_ptr,
    n_chunks, scale, max_norm,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """norm = scale sqrt(sum of partial), clip = min(1, max_norm / (norm + 1e-6)). One program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, n_chunks, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < n_chunks, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0)) * scale
    tl.store(norm_ptr, norm.to(tl.float32))
    ratio = max_norm / (norm + 1e-6)
    free = (ratio > 1.0) | (max_norm == float("inf"))
    tl.store(clip_ptr, tl.where(free, 1.0, ratio))  # a nan stays: no step on such gradients


@triton.jit
def adamw_update_kernel(
    table_ptr, owner_ptr, clip_ptr, partial_ptr, found_inf_ptr,
    KINDS: tl.constexpr, HAS_PEAK: tl.constexpr, CLIP: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of one chunk; without CLIP also partial[chunk], the sum of its squared gradients.

    None where found_inf is not 0; with it CLIP is set, as the norm is made before.
    """
    if found_inf_ptr is not None:  # noqa: SIM102 (known at compile time, and `and` is not)
        if tl.load(found_inf_ptr) != 0.0:
            return
    table_ptr, begin, whole, end = _chunk(table_ptr, owner_ptr, COLUMNS, CHUNK)
    kind = tl.load(table_ptr + KIND)
    clip = tl.full((), 1.0, tl.float64)
    if CLIP:
        clip = tl.load(clip_ptr)
    total = tl.zeros((), tl.float64)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            total = _update_chunk(table_ptr, clip, begin, whole, end, KINDS, i, HAS_PEAK, BLOCK)
    if not CLIP:
        tl.store(partial_ptr + tl.program_id(0), total)


def adamw_step_triton(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    hyper: Tensor,
    decoupled: bool,
    maximize: bool,
    grad_scale: float,
    max_norm: float,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Steps every parameter in place; the norm of all grads * grad_scale, float32 on their device.

    hyper [P, 6] float64 is on the host, or on their device, from where CUDA graphs read it anew.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters)
    step = Step(*lists, hyper, decoupled, maximize, grad_scale)
    if found_inf is not None:
        one, like = found_inf.numel() == 1, params[0] if params else hyper
        guards.expect(one, OP, "found_inf", "have one element", list(found_inf.shape))
        guards.expect_like(OP, "found_inf", found_inf, like, found_inf.shape, torch.float32)
    norm = step.empty(torch.float32)
    clip = step.empty(torch.float64)
    if not step.chunks:
        return norm.zero_()
    partial = step.empty(torch.float64, step.chunks)
    sizes = {"COLUMNS": len(COLUMNS), "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    grid = (step.chunks,)
    clips = not math.isinf(max_norm) or found_inf is not None  # else it comes with the update

    def update() -> None:
        adamw_update_kernel[grid](
            step.table, step.owner, clip, partial, found_inf,
            KINDS=step.kinds, HAS_PEAK=len(max_exp_avg_sqs) > 0, CLIP=clips, **sizes,
        )  # fmt: skip

    if clips:
        adamw_norm_kernel[grid](step.table, step.owner, partial, KINDS=step.kinds, **sizes)
    else:
        update()
    adamw_final_kernel[(1,)](
        partial, norm, clip, step.chunks, abs(grad_scale), max_norm,
        BLOCK=FINAL_BLOCK, num_warps=4,
    )  # fmt: skip
    if clips:
        update()
    step.write_back()
    return norm
