"""Counters of launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

SECTOR = 32  # bytes; what global memory moves at once


@dataclasses.dataclass
class Stats:
    """What a kernel did; several launches add up with `+`, or `Stats.total(list)`.

    Bytes are those asked for by lanes, sectors the 32-byte pieces each warp instruction touches.
    The fields from warp_instructions to divergent_steps are in the order of engine/stats.h.
    """

    warp_instructions: int = 0
    integer_instructions: int = 0
    load_bytes: int = 0
    load_sectors: int = 0
    store_bytes: int = 0
    store_sectors: int = 0
    atomic_operations: int = 0  # by lanes; they count as a load and a store, too
    distinct_read: int = 0  # bytes read at least once: compulsory traffic
    distinct_written: int = 0
    shared_load_waves: int = 0
    shared_load_ideal: int = 0  # waves without bank conflicts
    shared_store_waves: int = 0
    shared_store_ideal: int = 0
    mma_flops: int = 0
    special_ops: int = 0  # by lanes: exp2, log2, reciprocal, square root, sine, tanh
    barriers: int = 0
    dram_read: int = 0  # bytes, by the model of L2
    dram_written: int = 0
    benign_writes: int = 0  # unordered writes of the value that was there
    divergent_steps: int = 0  # steps of warps whose lanes stood at several instructions
    launches: int = 0
    kernel: str = ""

    def __add__(self, other: Stats) -> Stats:
        names = [field.name for field in dataclasses.fields(self) if field.type == "int"]
        summed = {name: getattr(self, name) + getattr(other, name) for name in names}
        kernel = self.kernel if self.kernel in (other.kernel, "") or not other.kernel else "several"
        return Stats(**summed, kernel=kernel or other.kernel)

    @staticmethod
    def total(stats: Iterable[Stats]) -> Stats:
        """The sum over a log of launches."""
        return sum(stats, Stats())

    @property
    def bytes(self) -> int:
        """Bytes loaded and stored."""
        return self.load_bytes + self.store_bytes

    @property
    def compulsory(self) -> int:
        """Bytes that must move at least once."""
        return self.distinct_read + self.distinct_written

    @property
    def traffic_ratio(self) -> float:
        """Bytes moved per compulsory byte; 1 is best."""
        return self.bytes / max(1, self.compulsory)

    @property
    def sector_efficiency(self) -> float:
        """Part of the sectors touched that was asked for; 1 is best."""
        return self.bytes / max(1, SECTOR * (self.load_sectors + self.store_sectors))

    @property
    def bank_factor(self) -> float:
        """Waves through shared memory per wave without bank conflicts; 1 is best."""
        ideal = self.shared_load_ideal + self.shared_store_ideal
        return (self.shared_load_waves + self.shared_store_waves) / max(1, ideal)
