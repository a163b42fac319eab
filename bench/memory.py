"""Peak memory of one call, measured, and an allocator that treats all contestants alike.

The peak is the kernel's high-water mark of this process's resident pages.

Writing 5 to /proc/self/clear_refs sets the mark (VmHWM) to what is resident now; after the call it
tells the most that was. Pages the C library kept from earlier calls are given back first, or a call
could fill those unseen. What a library keeps for good after its first call (a scratch buffer of
oneDNN, say) counts for nobody. Linux only; None elsewhere.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_SETTLED = 2**25  # bytes; what is larger glibc maps from the system and returns to it every time
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def settle_allocator() -> None:
    """Take glibc's allocator where a process ends up that has once freed some 32 MB in one piece.

    It returns free memory to the system beyond a limit that grows with such pieces. Until then the
    limit is a few MB, and it is luck which contestant's results are mapped and cleared anew in each
    call: 330 page faults in 600 us beside a kernel of 70 us. Larger pieces are always mapped anew.
    """
    torch.empty(_SETTLED - 2**13, dtype=torch.uint8)


def resident(field: str = "VmRSS") -> int:
    """Bytes of one field of /proc/self/status: VmRSS (now) or VmHWM (at most, since the reset)."""
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> bool:
    """Return unused pages and begin a new high-water mark; False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text(_RESET_PEAK)
    except (AttributeError, OSError):
        return False
    return True


def extra_peak(call: Callable[[], object]) -> int | None:
    """Bytes that one call takes at most beyond what was resident before it, its results included.

    The smaller of two calls: the first one may still touch pages for good.
    """
    peaks = []
    for _ in range(2):
        if not reset_peak():
            return None
        before = resident()
        result = call()
        peaks.append(resident("VmHWM") - before)
        del result
    return max(0, min(peaks))
