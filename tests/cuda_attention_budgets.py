"""The limits of attention in CUDA C++ for tests/cuda_budgets.py: the calls are Triton's budgets."""

import dataclasses

from tests.triton_budget_cases import Budget

TILE = 64  # queries and keys that a warpgroup, or two warps, multiply as one
# On capability 8 small heads move more than in Triton: delta is made by a launch of its own, which
# reads O and dO once more, and each warp asks for lse and delta of the queries that pass.
STAYS = {
    "attention/1x2:1x256x64 causal sm_80": 1.17,
    "attention/1x2:1x256x128 causal sm_80": 1.1,
}


def limited(budget: Budget) -> Budget:
    """The budget with the names of our kernels; on the diagonal half of a tile is for naught."""
    time = int(budget.name.split()[0].split("x")[2])  # attention/1x2:1x256x64 causal sm_80
    useful = {name.lstrip("_"): flops for name, flops in budget.useful.items()}
    more = {name: {"multiplied": 1 + TILE / time} for name in useful}
    return dataclasses.replace(budget, useful=useful, more=more)
