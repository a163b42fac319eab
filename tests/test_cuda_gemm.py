"""The CUDA GEMM and the passes beside it, kernel by kernel on the emulator, against float64."""

import contextlib
import dataclasses
import re
import shutil
import subprocess

import pytest
import torch

from tests.cuda_gemm import (
    ACTIVATIONS,
    ARCHS,
    FLOAT,
    HOPPER,
    LARGE,
    SMALL,
    SOURCE,
    TMA,
    TMA_WIDE,
    B,
    F,
    H,
    Linear,
    act_backward,
    gemm,
    linear,
    module,
    pointer,
    weight_gradient,
)
from tests.emulator import Module, Stats, Violation, library, nvcc

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest) -> Module:
    return module(request.param)


# Odd sizes: elements one by one; 40 and 136: whole 16-byte pieces and a tail of each tile; K of 0.
@pytest.mark.parametrize("sizes", [(37, 53, 29), (70, 68, 40), (65, 136, 200), (3, 8, 0)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "majors", "tile"),
    [
        (B, ("depth", "depth"), LARGE),
        (B, ("depth", "depth"), SMALL),
        (H, ("depth", "rows"), SMALL),
        (F, ("depth", "depth"), FLOAT),
    ],
    ids=["bfloat16 large", "bfloat16", "float16 flipped", "float32"],
)
def test_gemm_is_as_good_as_torch(kernels, dtype, majors, tile, sizes) -> None:
    linear(kernels, dtype, sizes, "gelu_tanh", majors, tile)
    gap = 8 if sizes[2] % 8 == 0 else 3
    options = {"order": "random", "seed": 1, "perturb": True, "gap": gap}
    linear(kernels, dtype, sizes, "none", majors, tile, **options)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gemm_has_every_activation(kernels, act) -> None:
    linear(kernels, B, (16, 32, 8), act)
    linear(kernels, F, (16, 32, 8), act, tile=FLOAT)


@pytest.mark.parametrize("dtype", [B, F], ids=str)
@pytest.mark.parametrize(("sizes", "slices"), [((130, 60, 150), 1), ((33, 37, 300), 3)], ids=str)
def test_gemm_of_weight_gradients_sums_the_bias(kernels, dtype, sizes, slices) -> None:
    weight_gradient(kernels, dtype, sizes, slices, order="greedy", perturb=True)


def test_gemm_gives_the_same_bits_in_every_schedule(kernels) -> None:
    """No order of warps or blocks changes a sum."""
    a, b = torch.randn(70, 96).to(B), torch.randn(60, 96).to(B)
    outs = []
    for seed in (1, 2):
        out = torch.empty(70, 60, dtype=B)
        epilogue = Linear(pointer(out), None, None, 60, 0, True)
        options = {"order": "random", "seed": seed}
        gemm(kernels, a, b, ("depth", "depth"), SMALL, epilogue, [out], **options)
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("tile", [LARGE, SMALL], ids=["large", "small"])
def test_gemm_main_loop_is_lean(kernels, tile) -> None:
    """Counters of 8 more steps: products, 16-byte copies once, few integer instructions."""
    rows, cols, depth, _ = tile
    runs = [linear(kernels, B, (rows, cols, depth * steps), tile=tile) for steps in (4, 12)]
    first, last = (dataclasses.asdict(run) for run in runs)
    more = {name: last[name] - first[name] for name in last if name != "kernel"}
    assert more["mma_flops"] == 2 * rows * cols * depth * 8
    assert more["load_bytes"] == more["distinct_read"] == 2 * (rows + cols) * depth * 8
    assert more["load_sectors"] * 32 == more["load_bytes"]
    per_mma = more["integer_instructions"] / (more["mma_flops"] / 4096)
    assert per_mma <= 4, per_mma
    assert runs[1].bank_factor == 1
    assert runs[1].sector_efficiency > 0.98  # but for the bias, element by element


def test_gemm_of_weight_gradients_has_no_bank_conflicts(kernels) -> None:
    assert weight_gradient(kernels, B, (128, 128, 64)).bank_factor == 1
    assert weight_gradient(kernels, F, (64, 64, 64)).bank_factor <= 1.05  # its sums have some


@pytest.mark.parametrize("arch", ARCHS)
def test_gemm_is_lean_as_compiled(arch, tmp_path) -> None:
    """No spills; in the main loops tensor cores, few integers, and 16 bytes or boxes at a time."""
    sass = pytest.importorskip("bench.sass", reason="nvdisasm is Triton's")
    text, cubin = tmp_path / "gemm.ptx", tmp_path / "gemm.cubin"
    text.write_text(nvcc.compile_ptx(SOURCE, arch))
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("needs ptxas")
    command = [ptxas, "-v", f"-arch={arch}", text, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spills and not any(map(int, spills))
    assert max(map(int, re.findall(r"Used (\d+) reg", done.stderr))) <= 255
    products = 0
    for name, code in sass.functions(cubin.read_bytes()).items():
        loop = code.main_loop
        if not (count := sass.products(loop)):
            assert "gemm" not in name or "EpilogueIf" in name, name
            continue
        products += 1
        by_maps, warpgroups = "tma" in name, "Li128ELi128ELi64E" in name or "tma" in name
        wanted = "HGMMA" if warpgroups else "HMMA"
        assert wanted in {i.name.split(".")[0] for i in loop if i.family == "tensor"}, name
        assert sum(i.family == "integer" for i in loop) <= (1 if by_maps else 4) * count, name
        if by_maps:  # another warp copies
            loads = {i.name.split(".")[0] for i in code.instructions if i.family != "constant"}
            assert "UTMALDG" in loads and "LDGSTS" not in loads, name
        else:
            assert sass.wide_part(loop) == 1, name
    assert products == (5 if arch == "sm_80" else 15)


@pytest.mark.parametrize("dtype", [B, F], ids=str)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "softplus", "mish"])
def test_act_backward_is_as_good_as_torch(kernels, act, dtype) -> None:
    act_backward(kernels, dtype, 45, 53, act)


def test_act_backward_moves_its_bytes_once(kernels) -> None:
    stats = act_backward(kernels, B, 128, 512, "gelu")
    assert stats.traffic_ratio < 1.02 and stats.sector_efficiency > 0.98
    assert stats.bank_factor <= 1.05


# The warpgroups of sm_90a: whole tiles and short ones, more steps than stages, every layout.
@pytest.mark.parametrize("sizes", [(130, 140, 328), (65, 133, 33), (128, 128, 64)], ids=str)
def test_wgmma_is_as_good_as_torch(sizes) -> None:
    kernels = module("sm_90a")
    linear(kernels, B, sizes, "silu", tile=HOPPER, order="greedy")
    linear(kernels, H, sizes, "none", ("depth", "rows"), HOPPER, order="random", perturb=True)
    m, n, k = sizes
    weight_gradient(kernels, B, (k, n, m), 2, HOPPER, order="random", seed=3)


def test_wgmma_main_loop_is_lean() -> None:
    """wgmma reads shared memory itself; an m16n8k16 of mma.sync would be 4096 FLOP."""
    runs = [linear(module("sm_90a"), B, (128, 128, 64 * n), tile=HOPPER) for n in (4, 12)]
    flops = runs[1].mma_flops - runs[0].mma_flops
    assert flops == 2 * 128 * 128 * 64 * 8
    integers = runs[1].integer_instructions - runs[0].integer_instructions
    assert integers / (flops / 4096) <= 4
    assert runs[1].bank_factor == 1
    fewer = runs[1].shared_load_waves - runs[0].shared_load_waves
    assert fewer == 0


# By tensor maps, one block for all tiles: whole tiles and short ones, boxes wholly outside, more
# steps than stages, every layout, rows that lie apart. Strides are multiples of 16 bytes.
@pytest.mark.parametrize("tile", [TMA, TMA_WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("sizes", [(136, 264, 456), (65, 8, 40), (128, 256, 64)], ids=str)
def test_gemm_by_tensor_maps_is_as_good_as_torch(sizes, tile) -> None:
    kernels = module("sm_90a")
    linear(kernels, B, sizes, "silu", tile=tile, gap=24, order="greedy", processors=1)
    options = {"order": "random", "seed": 2, "perturb": True}
    linear(kernels, H, sizes, "none", ("depth", "rows"), tile, **options)
    m, n, k = sizes
    m = -(-m // 8) * 8  # rows of dY and x that are multiples of 16 bytes
    weight_gradient(kernels, B, (k, n, m), 2, tile, order="random", seed=3)


def test_gemm_by_tensor_maps_gives_the_same_bits_for_any_number_of_blocks() -> None:
    """Which block takes a tile, and when, changes no sum."""
    a, b, outs = torch.randn(264, 200).to(B), torch.randn(264, 200).to(B), []
    for processors in (1, 3, 9):
        out = torch.empty(264, 264, dtype=B)
        epilogue = Linear(pointer(out), None, None, 264, 0, True)
        options = {"order": "random", "seed": processors, "processors": processors}
        majors = ("depth", "depth")
        gemm(module("sm_90a"), a, b, majors, TMA, epilogue, [out], **options)
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("tile", [TMA, TMA_WIDE], ids=["narrow", "wide"])
def test_gemm_by_tensor_maps_has_a_lean_main_loop(tile) -> None:
    """Counters of 8 more steps: whole boxes once, and next to nothing else to do."""
    rows, cols, depth, _ = tile
    runs = [linear(module("sm_90a"), B, (rows, cols, depth * n), tile=tile) for n in (8, 16)]
    first, last = (dataclasses.asdict(run) for run in runs)
    more = {name: last[name] - first[name] for name in last if name != "kernel"}
    assert more["mma_flops"] == 2 * rows * cols * depth * 8
    assert more["load_bytes"] == more["distinct_read"] == 2 * (rows + cols) * depth * 8
    assert more["load_sectors"] * 32 == more["load_bytes"]
    assert more["shared_load_waves"] == more["shared_store_waves"] == 0
    assert more["integer_instructions"] / (more["mma_flops"] / 4096) <= 1
    assert runs[1].bank_factor == 1


# What each defect is: kernels/cuda names it where it stands.
DEFECTS = {
    101: lambda k: weight_gradient(k, B, (136, 64, 100)),
    102: lambda k: weight_gradient(k, B, (136, 64, 100)),
    103: lambda k: weight_gradient(k, B, (136, 64, 100)),
    104: lambda k: check_banks(weight_gradient(k, B, (128, 128, 64))),
    105: lambda k: weight_gradient(k, B, (136, 64, 100)),
    106: lambda k: weight_gradient(k, B, (33, 37, 300), 3),
    107: lambda k: weight_gradient(k, B, (33, 37, 300), 3),
    108: lambda k: act_backward(k, B, 300, 53, "gelu"),
    109: lambda k: act_backward(k, B, 300, 53, "gelu"),
}


def check_banks(stats: Stats) -> None:
    assert stats.bank_factor <= 1.05


@pytest.mark.parametrize("mutant", DEFECTS)
def test_gemm_defect_is_caught(mutant) -> None:
    with pytest.raises((AssertionError, Violation)):
        DEFECTS[mutant](module("sm_80", mutant))


@pytest.mark.parametrize("mutant", [0, 111, 112])
def test_wgmma_defect_is_caught(mutant) -> None:
    told = pytest.raises((AssertionError, Violation)) if mutant else contextlib.nullcontext()
    with told:
        weight_gradient(module("sm_90a", mutant), B, (128, 136, 320), 1, HOPPER, order="random")


# 113, 114: a phase too early, bytes not expected; 115, 116: a wgmma neither waited for nor fenced;
# 117: another XOR of the chunks; 118, 119: barriers not initialised, a stage not free.
@pytest.mark.parametrize("mutant", [0, *range(113, 120)])
def test_defect_of_the_ring_is_caught(mutant) -> None:
    told = pytest.raises((AssertionError, Violation)) if mutant else contextlib.nullcontext()
    with told:
        options = {"order": "random", "processors": 1}
        weight_gradient(module("sm_90a", mutant), B, (128, 136, 640), 1, TMA, **options)


def test_gemm_without_defect_passes_what_catches_them() -> None:
    kernels = module("sm_80")
    for check in DEFECTS.values():
        check(kernels)
