"""The launches of linear_act and linear_glu in large tiles, for tests/cuda_budgets.py.

The launchers take large tiles where they fill a GPU; the emulator counts matrices that fill none.
So the kernels are launched here as the launchers would, tile by tile, as Triton's budgets do.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from tests import cuda_gemm, cuda_glu, triton_budgets
from tests.cuda_gemm import ACTIVATIONS, LARGE, TMA_WIDE, Linear, Store, pointer
from tests.emulator import Module, Stats
from tests.triton_budget_cases import Budget

B = torch.bfloat16
SAVED = {"gelu"}  # activations here whose derivative needs the pre-activation


class Launch(NamedTuple):
    """What tests.triton_budgets counts a launch by."""

    name: str
    grid: tuple[int, int, int]
    stats: Stats


def sizes(budget: Budget) -> tuple[int, int, int, str]:
    """(m, k, n, act) of a name like linear_act/1024x256->256 relu sm_80."""
    shape, act = budget.name.split("/")[1].split()[:2]
    m, k = shape.split("->")[0].split("x")
    return int(m), int(k), int(shape.split("->")[1]), act


def limited(budget: Budget) -> Budget:
    """The budget with the names of our kernels and their limits."""
    m, k, n, act = sizes(budget)
    if budget.name.startswith("linear_glu/"):
        product = 2 * m * k * n
        if budget.capability == 80:
            return dataclasses.replace(budget, useful={"gemm_kernel": 6 * product})
        useful = {"gemm_tma_pair_kernel": 4 * product, "gemm_tma_kernel": 2 * product}
        return dataclasses.replace(budget, useful=useful)
    name = "gemm_kernel" if budget.capability == 80 else "gemm_tma_kernel"
    more = {}
    if act == "none":
        # The bias gradient is made beside dW on tensor cores: eight columns more in one column of
        # tiles of one of the three products.
        more[name] = {"multiplied": 1 + 8 / k / 3}
    return dataclasses.replace(budget, useful={name: 3 * 2 * m * k * n}, more=more)


def launches(budget: Budget) -> list[Launch]:
    """Forward and backward, each launch counted."""
    if budget.name.startswith("linear_glu/"):
        return _glu_launches(budget)
    m, k, n, act = sizes(budget)
    kernels = cuda_gemm.module("sm_80" if budget.capability == 80 else "sm_90a")
    tile = LARGE if budget.capability == 80 else TMA_WIDE
    options = {"l2_bytes": triton_budgets.CACHE, "processors": budget.processors}
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s).to(B) for s in ((m, k), (n, k), (n,)))
    out, dx, dweight = (torch.empty(*s, dtype=B) for s in ((m, n), (m, k), (n, k)))
    preact = torch.empty_like(out) if act in SAVED else None
    forward = Linear(*map(pointer, (out, preact, bias)), n, ACTIVATIONS.index(act), True)
    written = [out] if preact is None else [out, preact]
    kinds = ("depth", "depth")

    def product(a: Tensor, b: Tensor, majors: tuple[str, str], *rest: object) -> Launch:
        stats = cuda_gemm.gemm(kernels, a, b, majors, tile, *rest, **options)
        tiles = -(-a.shape[0] // tile[0]) * -(-b.shape[0] // tile[1])
        by_maps = tile == TMA_WIDE
        grid = min(tiles, budget.processors) if by_maps else tiles
        return Launch("gemm_tma_kernel" if by_maps else "gemm_kernel", (grid, 1, 1), stats)

    options["reachable"] = [bias]
    found = [product(x, weight, kinds, forward, written)]
    options["reachable"] = []
    d, sums = torch.randn(m, n).to(B), None
    if act == "none":
        sums = torch.empty(1, n)
    else:
        found += _derivative(kernels, d, out if preact is None else preact, act)
    into = (Store(pointer(t), None, k, 0, True) for t in (dx, dweight))
    found.append(product(d, weight.t(), ("depth", "rows"), next(into), [dx]))
    found.append(product(d.t(), x.t(), ("rows", "rows"), next(into), [dweight], 1, sums))
    if sums is not None:
        found.append(_column_sums(kernels, sums, n, 1))
    return found


def _derivative(kernels: Module, d: Tensor, saved: Tensor, act: str) -> list[Launch]:
    (m, n), blocks = d.shape, -(-d.shape[0] // 32)
    dpre, partial = torch.empty_like(d), torch.empty(blocks, n)
    pointers = map(pointer, (d, saved, dpre, partial))
    args = cuda_gemm.ActBackward(*pointers, m, n, ACTIVATIONS.index(act), True)
    grid = (-(-n // 256), blocks)
    stats = kernels.launch(
        cuda_gemm.find(kernels, "act_backward", "bfloat16"), grid, 256, [bytes(args)],
        reachable=[d, saved, dpre, partial], uninitialised=[dpre, partial],
        l2_bytes=triton_budgets.CACHE,
    )  # fmt: skip
    first = Launch("act_backward_kernel", (*grid, 1), stats)
    return [first, _column_sums(kernels, partial, n, blocks)]


def _column_sums(kernels: Module, partial: Tensor, n: int, rows: int) -> Launch:
    out, grid = torch.empty(n, dtype=B), -(-n // 128)
    args = [out, partial, n, partial.stride(0), rows, True]
    stats = kernels.launch(
        cuda_gemm.find(kernels, "column_sums"), grid, 256, args, uninitialised=[out],
        l2_bytes=triton_budgets.CACHE,
    )  # fmt: skip
    return Launch("column_sums_kernel", (grid, 1, 1), stats)


def _glu_launches(budget: Budget) -> list[Launch]:
    m, k, n, act = sizes(budget)
    arch = "sm_80" if budget.capability == 80 else "sm_90a"
    kernels, tile = cuda_glu.module(arch), cuda_glu.tile_of(budget.capability)
    by_maps, cache = tile == TMA_WIDE, {"l2_bytes": triton_budgets.CACHE}
    options = {"processors": budget.processors, **cache}
    torch.manual_seed(0)
    x, gate, up, dy = (torch.randn(*s).to(B) for s in ((m, k), (n, k), (n, k), (m, n)))

    def launch(name: str, cols: int, stats: Stats, rows: int = m) -> Launch:
        tiles = -(-rows // tile[0]) * -(-cols // tile[1])
        grid = min(tiles, budget.processors) if by_maps else tiles
        return Launch(name, (grid, 1, 1), stats)

    own, paired = "gemm_kernel", "gemm_kernel"
    if by_maps:
        own, paired = "gemm_tma_kernel", "gemm_tma_pair_kernel"
    made, stats = cuda_glu.forward(kernels, x, gate, up, None, act, tile, **options)
    found = [launch(paired, 2 * n, stats)]
    pair, grid, stats = cuda_glu.split(kernels, dy, made[1], made[2], act, **cache)
    found.append(Launch("glu_backward_kernel", (*grid, 1), stats))
    _, stats = cuda_glu.input_gradient(kernels, pair, gate, up, tile, **options)
    found.append(launch(paired, k, stats))
    for half in (pair[:, :n], pair[:, pair.shape[1] // 2 :][:, :n]):
        rest = (cuda_gemm.module(arch), half, x, budget.capability)
        found.append(launch(own, k, cuda_glu.weight_gradient(*rest, **options), n))
    return found
