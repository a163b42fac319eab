"""How many multiprocessors the kernels may fill."""

import functools

from torch import Tensor
from triton.runtime import driver


def processors(t: Tensor) -> int:
    """Multiprocessors of the device that Triton launches on for `t`."""
    return _of_device(t.device.index) if t.is_cuda else _ask(0)


@functools.cache
def _of_device(index: int) -> int:
    return _ask(index)


def _ask(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["multiprocessor_count"])
