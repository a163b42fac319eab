"""The limits of attention in CUDA C++ for tests/cuda_budgets.py: the calls are Triton's budgets."""

import dataclasses

from tests.triton_budget_cases import Budget

TILE = 64  # queries and keys that a warpgroup, or two warps, multiply as one
# Blocks of a causal head come longest first, and take 64 keys at a time: of what warps ask for, as
# much as in Triton, less is still in a cache as small as the model's from one block to the next.
STAYS = {"attention/1x2:1x256x64 causal sm_80": 1.025}


def limited(budget: Budget) -> Budget:
    """The budget with the names of our kernels; on the diagonal half of a tile is for naught."""
    time = int(budget.name.split()[0].split("x")[2])  # attention/1x2:1x256x64 causal sm_80
    useful = {name.lstrip("_"): flops for name, flops in budget.useful.items()}
    more = {name: {"multiplied": 1 + TILE / time} for name in useful}
    return dataclasses.replace(budget, useful=useful, more=more)
