"""The stand-in for the CUDA runtime as Python sees it: runtime/stand_in.h in ctypes."""

from __future__ import annotations

import ctypes
import functools

import pyfast.backend
from tests.emulator import nvcc

Three = ctypes.c_uint32 * 3


class Request(ctypes.Structure):
    """StandInLaunch in runtime/stand_in.h."""

    _fields_ = [
        ("fatbin", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("grid", Three),
        ("block", Three),
        ("cluster", Three),
        ("shared_bytes", ctypes.c_uint64),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("broken", ctypes.c_char_p),
    ]


class Memory(ctypes.Structure):
    """StandInMemory in runtime/stand_in.h."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("element", ctypes.c_uint32),
        ("blank", ctypes.c_uint32),
    ]


LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Request))
MEMORY = ctypes.CFUNCTYPE(None, ctypes.POINTER(Memory))
THREADS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)


class StandIn(ctypes.Structure):
    """StandIn in runtime/stand_in.h."""

    _fields_ = [
        ("launch", LAUNCH),
        ("memory", MEMORY),
        ("threads", THREADS),
        ("capability", ctypes.c_int32),
        ("processors", ctypes.c_int32),
        ("shared_limit", ctypes.c_int32),
        ("in_room", ctypes.c_int32),
        ("host", ctypes.c_uint64),
        ("guards", ctypes.c_int32),
    ]


def missing() -> str | None:
    """Why no CUDA kernel can be emulated here, for people; None where they can."""
    if not nvcc.available():
        return "needs nvcc"
    return None if stand_in() is not None else "needs PYFAST_CUDA=1, which builds the CUDA kernels"


@functools.cache
def stand_in() -> StandIn | None:
    """The stand-in that the extension is linked to, if it is."""
    extension = pyfast.backend.extension()
    if extension is None:
        return None
    try:
        return StandIn.in_dll(ctypes.CDLL(extension.__file__), "stand_in")
    except ValueError:
        return None
