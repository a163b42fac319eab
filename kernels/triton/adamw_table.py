"""What adamw_step_ tells its kernels: one row of addresses and numbers per parameter.

With `hyper` on the GPU nothing comes from memory of the host, and the step can be captured into a
CUDA graph: the addresses are those of the capture, the numbers what `hyper` holds at each replay.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast import triton_rooms
from pyfast.kernels import guards

OP = "adamw_step_"
CHUNK = 16384  # elements a program updates
COLUMNS = (
    *("param", "grad", "exp_avg", "exp_avg_sq", "peak", "master", "count", "first", "kind"),
    *("grad_factor", "keep", "l2", "rate1", "beta2", "rate2", "step_size", "root_scale", "eps"),
)
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
HOST_COLUMNS = COLUMNS.index("kind") + 1  # the others are made from hyper, where that lies
WRITTEN_AT_ONCE = 128  # numbers among the arguments of a launch, which take 4 KB at most
# Added to these, that Triton takes them all for 64-bit ones and compiles once.
OFFSET = tl.constexpr(1 << 62)


@triton.jit(do_not_specialize=["values"])
def adamw_write_kernel(out_ptr, values):
    """out = values, less OFFSET: what a CUDA graph keeps among the arguments of the launch."""
    for i in tl.static_range(len(values)):
        tl.store(out_ptr + i, values[i] - OFFSET)


class Step:
    """The checked arguments of one step: `table` and `owner` on the device, and what they need.

    `kinds` are the combinations of dtypes that occur, for which the kernels are compiled.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        peaks: list[Tensor],
        masters: list[Tensor],
        hyper: Tensor,
        decoupled: bool,
        maximize: bool,
        grad_scale: float,
    ) -> None:
        lists = (params, grads, exp_avgs, exp_avg_sqs, peaks, masters)
        _expect_lists(lists, hyper)
        self.device = params[0].device if params else hyper.device
        self.capturable = _expect_hyper_within_reach(hyper, self.device)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._kept: list[Tensor] = []  # what the table points to lives until the step is launched
        tensors = [[t[i] if t else None for t in lists] for i in range(len(params))]
        for i, own in enumerate(tensors):
            if own[5] is not None and own[5].numel() == 0:
                own[5] = None  # "none"
            _expect_parameter(i, own, params[0])
        _expect_apart(tensors)
        self._fill(tensors, _coefficients(hyper, decoupled, maximize, grad_scale))

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised, on the device of the parameters."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def write_back(self) -> None:
        """Copy what was updated in a copy to where it belongs."""
        for original, copy in self._copies:
            original.copy_(copy)

    def _fill(self, tensors: list[list[Tensor | None]], numbers: Tensor) -> None:
        kinds: dict[tuple, int] = {}
        rows, counts = [], []
        first = 0
        for own in tensors:
            count = own[0].numel()
            packed = [self._packed(k, t) for k, t in enumerate(own)]
            kind = kinds.setdefault(_kind(packed), len(kinds))
            rows.append(
                [*(t.data_ptr() if t is not None else 0 for t in packed), count, first, kind]
            )
            counts.append(count)
            first += -(-count // CHUNK)
        self.kinds, self.chunks = tuple(kinds), first
        if rows and self.capturable:
            self.table = torch.cat((self._written(rows), numbers.view(torch.int64)), dim=1)
            self.owner = _owners_by_table(self.table, self.chunks)
            return
        table = torch.empty((len(rows), len(COLUMNS)), dtype=torch.int64, pin_memory=self._on_gpu())
        if rows:
            table[:, :HOST_COLUMNS] = torch.tensor(rows, dtype=torch.int64)
            table[:, HOST_COLUMNS:] = numbers.view(torch.int64)
        self.table = table.to(self.device, non_blocking=True)
        self.owner = _owners(tuple(counts), self.device)

    def _written(self, rows: list[list[int]]) -> Tensor:
        """`rows` on the device without a copy from memory of the host, which a graph would redo."""
        numbers = [number + OFFSET.value for row in rows for number in row]
        launches = triton.cdiv(len(numbers), WRITTEN_AT_ONCE)
        written = self.empty(torch.int64, launches, WRITTEN_AT_ONCE)
        numbers += [OFFSET.value] * (written.numel() - len(numbers))
        for i, out in enumerate(written):
            values = tuple(numbers[i * WRITTEN_AT_ONCE : (i + 1) * WRITTEN_AT_ONCE])
            adamw_write_kernel[(1,)](out, values, num_warps=1)
        count = len(rows) * HOST_COLUMNS
        return written.flatten()[:count].view(len(rows), HOST_COLUMNS)

    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _packed(self, which: int, t: Tensor | None) -> Tensor | None:
        """The tensor itself where it is contiguous, else a copy; gradients are only read."""
        if t is None or t.is_contiguous():
            return t
        with torch.no_grad():
            copy = t.detach().contiguous()
        self._kept.append(copy)
        if LISTS[which] != "grads":
            self._copies.append((t.detach(), copy))
        return copy


def _owners_by_table(table: Tensor, chunks: int) -> Tensor:
    """_owners, made on the device anew: a graph owns what it was captured with."""
    first = table[:, COLUMNS.index("first")].contiguous()
    every = torch.arange(chunks, dtype=torch.int64, device=table.device)
    return torch.searchsorted(first, every, right=True, out_int32=True) - 1


@functools.lru_cache(maxsize=8)
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[chunks] int32: the parameter each chunk belongs to; the same in every step."""
    chunks = torch.tensor([-(-count // CHUNK) for count in counts], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), chunks)
    return owners.to(device)


def _kind(packed: list[Tensor | None]) -> tuple:
    """(dtypes of parameter, gradient, moments; has a master; their alignments and its, in bytes).

    Beside a wider array 16-bit ones are read 8 bytes at a time, so that a thread has the same
    elements of all of them in one access of each.
    """
    param, grad, moment, _, _, master = packed
    arrays = (param, grad, moment, master if master is not None else param)
    widest = max(t.itemsize for t in arrays)
    aligned = all(t is None or t.data_ptr() % guards.ALIGNMENT == 0 for t in packed)

    def alignment(t: Tensor) -> int:
        return guards.ALIGNMENT * t.itemsize // widest if aligned else t.itemsize

    codes = (CODES[t.dtype] for t in (param, grad, moment))
    return (*codes, master is not None, *(alignment(t) for t in arrays))


def _coefficients(hyper: Tensor, decoupled: bool, maximize: bool, grad_scale: float) -> Tensor:
    """[P, 9] float64: the numbers of the formula that stay the same over a parameter."""
    lr, beta1, beta2, eps, decay, step = hyper.unbind(1)
    one = torch.ones_like(lr)
    columns = (
        one * (grad_scale * (-1.0 if maximize else 1.0)),
        1 - lr * decay if decoupled else one,
        torch.zeros_like(lr) if decoupled else decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        (1 - beta2**step).rsqrt(),
        eps,
    )
    return torch.stack(columns, dim=1)


def _expect_lists(lists: tuple[list[Tensor], ...], hyper: Tensor) -> None:
    count = len(lists[0])
    for name, tensors, optional in zip(LISTS, lists, (0, 0, 0, 0, 1, 1), strict=True):
        rule = f"have one entry per parameter ({count})"
        guards.expect(
            len(tensors) == count or (optional and not tensors), OP, name, rule, len(tensors)
        )
    guards.expect(tuple(hyper.shape) == (count, 6), OP, "hyper", f"be {[count, 6]}", [*hyper.shape])
    guards.expect_dtype(OP, "hyper", hyper, torch.float64)


def _expect_hyper_within_reach(hyper: Tensor, device: torch.device) -> bool:
    """Whether the step may be captured into a CUDA graph: `hyper` is on the GPU itself."""
    if hyper.device.type == "cpu":
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            rule = f"be on {device} while a CUDA graph is captured"
            raise RuntimeError(f"{OP}: hyper must {rule}; got {hyper.device}")
        return False
    if hyper.device != device:
        raise RuntimeError(f"{OP}: hyper must be on the cpu or {device}; got {hyper.device}")
    return True


def _expect_parameter(i: int, own: list[Tensor | None], like: Tensor) -> None:
    """Shapes, dtypes and device of what belongs to one parameter, as in csrc/cpu/adamw.cpp."""
    param, _, moment, *_, master = own
    name = f"params[{i}]"
    guards.expect_launchable(OP, name, param)
    guards.expect_dtype(OP, name, param, *triton_rooms.DTYPES[OP])
    narrow = param.itemsize == 2
    either = (param.dtype, torch.float32) if narrow else (param.dtype,)
    dtypes = ((param.dtype,), either, either, (moment.dtype,), (moment.dtype,), (torch.float32,))
    for list_name, t, allowed in zip(LISTS, own, dtypes, strict=True):
        if t is not None:
            guards.expect_like(OP, f"{list_name}[{i}]", t, like, param.shape, *allowed)
            guards.expect(t.layout == torch.strided, OP, f"{list_name}[{i}]", "be dense", t.layout)
    if master is not None:
        rule = "be empty, as the parameter is not 16-bit"
        guards.expect(narrow, OP, f"masters[{i}]", rule, param.dtype)


def _expect_apart(tensors: list[list[Tensor | None]]) -> None:
    """No element is written twice; gradients may share memory with each other."""
    spans = []
    for i, own in enumerate(tensors):
        for name, t in zip(LISTS, own, strict=True):
            if t is not None and t.numel():
                written, begin = name != "grads", t.data_ptr()
                extent = _extent(f"{name}[{i}]", t, written)
                spans.append((begin, begin + extent * t.itemsize, written, f"{name}[{i}]"))
    furthest = furthest_written = (0, 0, False, "")
    for span in sorted(spans):
        other = furthest if span[2] else furthest_written
        guards.expect(other[1] <= span[0], OP, span[3], f"not share memory with {other[3]}", "that")
        furthest = max(furthest, span, key=lambda s: s[1])
        if span[2]:
            furthest_written = max(furthest_written, span, key=lambda s: s[1])


def _extent(name: str, t: Tensor, written: bool) -> int:
    """Elements from the lowest to the highest address."""
    if t.is_contiguous():
        return t.numel()
    elements = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            guards.expect(
                not written or stride >= elements, OP, name, "not overlap itself", list(t.stride())
            )
            elements += (size - 1) * stride
    return elements
