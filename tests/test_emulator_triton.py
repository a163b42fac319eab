"""What Triton compiles for sm_80 and sm_90 runs on the emulator and gives the right numbers.

Triton's code is proven on hardware: it comes out right only if fragments, swizzles, descriptors and
barriers are what the hardware has.
"""

import dataclasses

import pytest
import torch

from tests.emulator import Violation, library

triton = pytest.importorskip("triton", reason="needs triton")
tl = pytest.importorskip("triton.language")
compiled = pytest.importorskip("tests.emulator.triton").compiled
emulated = pytest.importorskip("tests.emulator.triton").emulated
libdevice = pytest.importorskip("triton.language.extra.libdevice")
TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")
ARCHS = [80, 90]


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, N)
    offs = rows[:, None] * N + rows[None, :]
    c = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION)
    tl.store(c_ptr + offs, c.to(c_ptr.dtype.element_ty))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float16, "ieee", 1e-6),
        (torch.bfloat16, "ieee", 1e-6),
        (torch.float32, "tf32", 1e-3),
        (torch.float32, "tf32x3", 2e-6),
        (torch.float32, "ieee", 1e-6),
    ],
)
def test_dot(arch: int, dtype: torch.dtype, precision: str, bound: float) -> None:
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
    c = torch.empty(64, 64)
    with emulated(arch) as log:
        dot_kernel[(1,)](a, b, c, 64, precision)
    exact = a.double() @ b.double()
    assert (c - exact).norm() < bound * exact.norm()
    if precision == "tf32":
        assert (c - exact).norm() > 1e-5 * exact.norm()  # not computed in more
    if precision != "ieee" or dtype != torch.float32:
        passes = 3 if precision == "tf32x3" else 1
        assert log[0].stats.mma_flops == passes * 2 * 64**3


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * K + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        y = tl.load(b + k[:, None] * N + n, mask=(k[:, None] < K) & (n < N), other=0.0)
        acc = tl.dot(x, y, acc)
    mask = (m[:, None] < M) & (n < N)
    tl.store(c + m[:, None] * N + n, acc.to(c.dtype.element_ty), mask=mask)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", [(100, 72, 80), (64, 128, 96)])
def test_pipelined_matmul(arch: int, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    exact = a.double() @ b.double()
    for order in ("greedy", "random"):
        c = torch.empty(m, n, dtype=torch.bfloat16)
        with emulated(arch, order=order):
            grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
            matmul_kernel[grid](a, b, c, m, n, k, 64, 64, 32, num_stages=3)
        assert (c - exact).norm() < 3e-3 * exact.norm()


@triton.jit
def device_descriptor_kernel(x, out, M, N, B: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [B, B])
    target = tl.make_tensor_descriptor(out, [M, N], [N, 1], [B, B])
    at = [tl.program_id(0) * B, tl.program_id(1) * B]
    target.store(at, source.load(at) * 2)


@pytest.mark.parametrize("arch", ARCHS)
def test_descriptors_made_on_the_device(arch: int) -> None:
    x, out = torch.randn(50, 40), torch.empty(50, 40)
    with emulated(arch) as log:
        device_descriptor_kernel[(2, 2)](x, out, 50, 40, 32)
    assert torch.equal(out, 2 * x)
    if arch == 90:
        assert "cp.async.bulk.tensor" in log[0].binary.ptx


def test_device_descriptors_want_the_acquiring_fence() -> None:
    """Without it the copy may read the map as it was: the same PTX with the fence taken out."""
    x, out = torch.randn(50, 40), torch.empty(50, 40)
    with compiled(90) as log:
        device_descriptor_kernel[(2, 2)](x, out, 50, 40, 32)
    binary, fence = log[0].binary, "fence.proxy.tensormap::generic.acquire"
    names = [f"{fence}.gpu [", fence]
    assert any(name in binary.ptx for name in names)
    lines = [line for line in binary.ptx.splitlines() if fence not in line]
    broken = dataclasses.replace(binary, ptx="\n".join(lines))
    scratch = torch.zeros(1 << 14, dtype=torch.uint8)
    scratch = scratch[-scratch.data_ptr() % 128 :]
    kernel, options = binary.name, {"shared_bytes": binary.shared}
    block = 32 * binary.num_warps
    args = [x, out, 50, 40, scratch, 0]
    binary.module.launch(kernel, (2, 2), block, args, **options)
    assert torch.equal(out, 2 * x)
    with pytest.raises(Violation, match=r"missing fence\.proxy\.tensormap"):
        broken.module.launch(kernel, (2, 2), block, args, **options)


@triton.jit
def descriptor_matmul_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                             SPECIALIZE: tl.constexpr):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=SPECIALIZE):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.bfloat16))


@pytest.mark.parametrize("order", ["greedy", "random"])
@pytest.mark.parametrize("specialize", [False, True])
def test_matmul_with_tensor_maps_and_wgmma(specialize: bool, order: str) -> None:
    m, n, k = 100, 72, 96
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    c = torch.zeros(m, n, dtype=torch.bfloat16)
    boxes = [[64, 32], [32, 64], [64, 64]]
    maps = [TensorDescriptor.from_tensor(t, box) for t, box in zip((a, b, c), boxes, strict=True)]
    with emulated(90, order=order) as log:
        descriptor_matmul_kernel[(2, 2)](*maps, k, 64, 64, 32, specialize, num_stages=3)
    exact = a.double() @ b.double()
    assert (c - exact).norm() < 3e-3 * exact.norm()
    assert "wgmma" in log[0].binary.ptx and "cp.async.bulk.tensor" in log[0].binary.ptx


@triton.jit
def scan_kernel(x_ptr, out_ptr, index_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.cumsum(x, 0))
    tl.store(out_ptr + N + offs, tl.sort(x))
    _, at = tl.max(x, 0, return_indices=True)
    tl.store(index_ptr, at)


def test_scan_sort_argmax() -> None:
    x, out, index = torch.randn(256), torch.empty(2, 256), torch.zeros(1, dtype=torch.int32)
    with emulated(80):
        scan_kernel[(1,)](x, out, index, 256)
    torch.testing.assert_close(out[0], x.cumsum(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], x.sort()[0]) and index.item() == x.argmax()


@triton.jit
def math_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, libdevice.tanh(x))
    tl.store(out_ptr + N + offs, libdevice.erf(x))
    tl.store(out_ptr + 2 * N + offs, tl.sigmoid(x))
    tl.store(out_ptr + 3 * N + offs, libdevice.expm1(x))
    tl.store(out_ptr + 4 * N + offs, tl.log(x * x + 1.0))
    tl.store(out_ptr + 5 * N + offs, tl.sin(x * 1e5))  # needs a table in local memory


@pytest.mark.parametrize("perturb", [False, True])
def test_library_functions(perturb: bool) -> None:
    x, out = torch.randn(128) * 3, torch.empty(6, 128)
    with emulated(90, perturb=perturb):
        math_kernel[(1,)](x, out, 128)
    d = x.double()
    exact = [d.tanh(), d.erf(), d.sigmoid(), d.expm1(), (d * d + 1).log()]
    exact = torch.stack([*exact, (x * 1e5).double().sin()])
    # two units in the last place of an exponential beside 1, relative to 0.01, are 2.4e-5
    error = (out - exact).abs() / (exact.abs() + 1e-2)
    assert error.max() < (3e-5 if perturb else 1e-5)


@triton.jit
def erf_kernel(x_ptr, out_ptr, steps, N: tl.constexpr):
    offs = tl.arange(0, N)
    for _ in range(steps):
        tl.store(out_ptr + offs, libdevice.erf(tl.load(x_ptr + offs)))
        x_ptr += N
        out_ptr += N


@pytest.mark.parametrize("order", ["greedy", "random"])
def test_lanes_meet_where_their_paths_join(order: str) -> None:
    """Small and large arguments part; loads and stores are of whole warps again."""
    x, out = torch.randn(6, 64) * 2, torch.empty(6, 64)
    with emulated(80, order=order) as log:
        erf_kernel[(1,)](x, out, 6, 64, num_warps=1)
    torch.testing.assert_close(out, x.erf())
    stats = log[0].stats
    assert stats.divergent_steps > 0 and stats.sector_efficiency == 1
    lines = dict(log[0].binary.module.profile("erf_kernel"))
    assert any("test_emulator_triton.py" in line for line in lines)
    assert sum(lines.values()) == stats.warp_instructions


@triton.jit
def atomic_kernel(out_ptr, x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.atomic_add(out_ptr + offs % 4, tl.load(x_ptr + offs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_atomic_add(dtype: torch.dtype) -> None:
    out = torch.zeros(4, dtype=dtype)
    with emulated(90, order="random"):
        atomic_kernel[(3,)](out, torch.ones(128, dtype=dtype), 128)
    assert out.tolist() == [96] * 4


@triton.jit
def racy_kernel(x_ptr, out_ptr, B: tl.constexpr):
    offs = tl.arange(0, B)
    tl.store(out_ptr + offs, tl.load(out_ptr + offs) + tl.load(x_ptr + tl.program_id(0) * B + offs))


def test_race_between_programs_names_the_line() -> None:
    x, out = torch.randn(4, 64), torch.zeros(64)
    with emulated(80), pytest.raises(Violation, match=r"race.*out_ptr|race.*arg1") as caught:
        racy_kernel[(4,)](x, out, 64)
    assert "test_emulator_triton.py:" in str(caught.value)


def test_liger_kernels() -> None:
    """Kernels of others: Liger's RMSNorm and cross-entropy, forward and backward."""
    rms = pytest.importorskip("liger_kernel.ops.rms_norm", reason="needs liger-kernel")
    cross_entropy = pytest.importorskip("liger_kernel.ops.cross_entropy")
    x, w, dy = torch.randn(6, 300), torch.randn(300), torch.randn(6, 300)
    logits, target = torch.randn(6, 3000), torch.randint(0, 3000, (6,))
    target[2] = -100
    with emulated(80):
        y, flat, r, block, warps, mode = rms.rms_norm_forward(x, w, 1e-6, 0.0, "llama", None)
        dx, dw = rms.rms_norm_backward(dy.clone(), flat, w, r, 0.0, mode, block, warps, False, None)
        mine = logits.clone().requires_grad_()
        loss = cross_entropy.cross_entropy_forward(
            mine, target, None, -100, 0.0, 0.0, "mean", None, False
        )[0]
    x, w = x.requires_grad_(), w.requires_grad_()
    exact = torch.nn.functional.rms_norm(x, (300,), w, 1e-6)
    gx, gw = torch.autograd.grad(exact, (x, w), dy)
    for got, wanted in ((y, exact), (dx, gx), (dw, gw)):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    logits.requires_grad_()
    exact = torch.nn.functional.cross_entropy(logits, target)
    exact.backward()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(mine.detach(), logits.grad, atol=1e-6, rtol=1e-4)


@triton.jit
def shifted_copy_kernel(x, out, shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out + offs, tl.load(x + shift + offs))


def test_what_lands_in_the_next_tensor_is_out_of_bounds() -> None:
    """Tensors lie side by side, as torch allocates them: a bound of its own for each."""
    memory = torch.arange(128.0)
    x, out = memory[:64], memory[64:]
    with emulated():
        shifted_copy_kernel[(1,)](x, out, 0, 64)
        assert torch.equal(out, x) and torch.equal(x, torch.arange(64.0))
        with pytest.raises(Violation, match=r"out of bounds.*x\[64\]"):
            shifted_copy_kernel[(1,)](x, out, 1, 64)
        whole = memory[:65]  # overlaps out: both stay where they are
        with pytest.raises(Violation, match="race"):
            shifted_copy_kernel[(1,)](whole, out, 1, 64)


def test_what_a_kernel_wrote_before_it_failed_stays() -> None:
    out = torch.zeros(64)
    with emulated(), pytest.raises(Violation, match="out of bounds"):
        shifted_copy_kernel[(2,)](torch.ones(64), out[:32], 0, 64)
    assert out[:32].sum() in (0, 32) and not out[32:].any()
