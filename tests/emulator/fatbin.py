"""The images that nvcc puts into an object file: PTX by architecture."""

from __future__ import annotations

import ctypes
import re
import struct

MAGIC, PTX = 0xBA55ED50, 1
HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
ENTRY = struct.Struct("<HHIQII")  # kind, version, bytes of this header, of the image, compressed


def ptx_images(address: int) -> dict[str, str]:
    """PTX text by target ("sm_90a") of the image at `address` in this process.

    Raises:
        ValueError: this is no such image, or its PTX is compressed.
    """
    magic, _, header_bytes, entry_bytes = HEADER.unpack(ctypes.string_at(address, HEADER.size))
    if magic != MAGIC:
        raise ValueError(f"ptx_images: address must be that of a fatbin; got magic {magic:#x}")
    found, at = {}, address + header_bytes
    while at < address + header_bytes + entry_bytes:
        kind, _, own, size, compressed, _ = ENTRY.unpack(ctypes.string_at(at, ENTRY.size))
        if kind == PTX:
            if compressed:
                raise ValueError("ptx_images: PTX must be text; compile with nvcc --no-compress")
            text = ctypes.string_at(at + own, size).rstrip(b"\0").decode()
            found[re.search(r"^\.target\s+(\w+)", text, re.M)[1]] = text
        at += own + size
    return found


def best_image(images: dict[str, str], capability: int) -> str | None:
    """The text a GPU of this capability runs: its own, else the newest that is older."""
    if exact := images.get(f"sm_{capability}a"):
        return exact
    plain = {int(t[3:]): text for t, text in images.items() if t[3:].isdigit()}
    usable = [number for number in plain if number <= capability]
    return plain[max(usable)] if usable else None
