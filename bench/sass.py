"""What the compiler made of the Triton kernels: registers, memory, occupancy, instruction mix.

    python -m bench.sass [OP ...] [--arch 80 90 100] [--json FILE]

Every kernel of an operation is compiled for sm_80, sm_90a and sm_100a at a size of real training
(CALLS) and read back with the cuobjdump and nvdisasm of the Triton wheel; nothing runs, no GPU is
needed. The main loop is the smallest one that multiplies on tensor cores, or else the smallest that
touches memory. The last line of stdout is one JSON object with a row per kernel and architecture.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pyfast
from bench import machine
from pyfast import backend
from pyfast.testing import (
    Case,
    adamw,
    attention,
    cross_entropy,
    linear_act,
    linear_cross_entropy,
    linear_glu,
    norm,
    rope,
)

CALLS = (
    linear_act(4096, 1024, 4096, "gelu_tanh"),
    linear_glu(4096, 1024, 4096),
    cross_entropy(64, 50257),
    linear_cross_entropy(4096, 1024, 16384),
    attention(1, 8, 512, 64, causal=True),
    attention(1, 8, 512, 128, causal=True),
    rope(1, 8, 512, 64),
    norm("layer_norm", 512, 1024, residual=True),
    norm("rms_norm", 512, 1024, residual=True),
    adamw(((1024, 1024),), max_norm=1.0),
)
WARP = 32
REGISTER_STEP = 8  # registers of a thread are given in eights
RESERVED_SHARED = 1024  # bytes of every block, on top of what it asks for


class Limits(NamedTuple):
    """What a multiprocessor has; CUDA programming guide, technical specifications."""

    shared: int  # bytes
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


MULTIPROCESSOR = {80: Limits(164 << 10), 90: Limits(228 << 10), 100: Limits(228 << 10)}
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
# Families of instructions by their first word; the first that fits counts.
FAMILIES = {
    "tensor": r"HGMMA|QGMMA|IGMMA|UTC\w*MMA|[HIQD]MMA",
    "async copy": r"LDGSTS|UBLKCP|UTMA\w*",
    "global": r"LDG|STG|LD|ST|ATOMG?|REDG?",
    "shared": r"LDSM|LDS|STSM|STS|ATOMS|LDT|STT|LDTM|STTM",
    "local": r"LDL|STL",
    "special": r"MUFU",
    "shuffle": r"SHFL|REDUX|VOTE\w*",
    "wait": r"BAR|SYNCS|(LDG)?DEPBAR|WARPSYNC|WARPGROUP(SET)?|ARRIVES|MEMBAR|FENCE|ERRBAR",
    "convert": r"F2FP?|F2I|I2FP?|FRND|I2I",
    "float": r"[FHD](ADD|MUL|FMA|SET|SETP|SEL|MNMX|CHK|SWZADD)2?|HADD2|HMUL2|HFMA2|HMNMX2|FMNMX3",
    "move": r"MOV|UMOV|R2UR|S2U?R|S2UR|CS2R|R2P|P2R|PRMT|UPRMT|CREDUX|R2B|B2R|UP2UR|UR2UP",
    "branch": r"BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|JMP|NOP|YIELD|NANOSLEEP|ELECT|KILL",
    "constant": r"LDC|LDCU|ULDC",
}


class Instruction(NamedTuple):
    """One line of SASS."""

    name: str  # with its modifiers: LDGSTS.E.BYPASS.128
    operands: str

    @property
    def family(self) -> str:
        """The family; whatever else there is computes integers and predicates."""
        word = self.name.split(".")[0]
        return next((f for f, rule in FAMILIES.items() if re.fullmatch(rule, word)), "integer")

    @property
    def width(self) -> int:
        """Bytes that a memory access moves for each lane."""
        found = re.search(r"\.(?:LTC\d+B\.)?(?:[US]?(8|16)|(64|128))(?=\.|$)", self.name)
        return 4 if found is None else int(found[1] or found[2]) // 8


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, and its loops as (first, last) instruction, both inside."""

    instructions: list[Instruction]
    loops: list[tuple[int, int]]

    @property
    def main_loop(self) -> list[Instruction]:
        """The smallest loop with the most tensor products, or the one with most accesses."""
        bodies = [self.instructions[first : last + 1] for first, last in self.loops]
        for families in ({"tensor"}, {"global", "async copy"}):
            found = [b for b in bodies if any(i.family in families for i in b)]
            if found:
                return min(found, key=len)
        return []


_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(cubin: bytes) -> dict[str, Code]:
    """Every kernel of a cubin by its mangled name, without the loads that fill slots and never
    happen."""
    text = _tool("nvdisasm", "-c", cubin=cubin)
    parts = re.split(r"\n\s*\.section\s+\.text\.", text)[1:]
    return {re.match(r"[\w$]+", part)[0]: _code(part) for part in parts}


def disassembled(cubin: bytes) -> Code:
    """The only kernel of a cubin."""
    (code,) = functions(cubin).values()
    return code


def _code(text: str) -> Code:
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif (found := _LINE.match(line)) and found[1] != "!PT":
            instructions.append(Instruction(found[2], found[3]))
    loops = []
    for at, instruction in enumerate(instructions):
        target = re.search(r"\.L_\w+", instruction.operands)
        first = labels.get(target[0], at) if target else at
        if instruction.name.startswith("BRA") and first < at:  # the last one jumps to itself
            loops.append((first, at))
    return Code(instructions, loops)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a thread and SHARED of a block, as cuobjdump tells them."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


def occupancy(arch: int, warps: int, registers: int, shared: int) -> tuple[float, str]:
    """(part of the multiprocessor's warps that can be there at once, what keeps more away)."""
    limits = MULTIPROCESSOR[arch]
    each = -(-max(1, registers) // REGISTER_STEP) * REGISTER_STEP * WARP
    blocks = {
        "registers": limits.registers // each // warps,
        "shared": limits.shared // (shared + RESERVED_SHARED),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    binding = min(blocks, key=blocks.__getitem__)
    return blocks[binding] * warps / limits.warps, binding


def products(loop: list[Instruction]) -> float:
    """Tensor products of a warp in units of an sm_80's, 16 x 8 x 16; 0 where sizes are not told.

    A wgmma is one of four warps. The sizes of tcgen05's stand in a register.
    """
    total = 0.0
    for name in (i.name for i in loop if i.family == "tensor"):
        if group := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", name):
            total += int(group[1]) * int(group[2]) * int(group[3]) / (16 * 8 * 16) / 4
        elif name.startswith(("HMMA", "IMMA", "DMMA", "QMMA")):
            total += 1
    return total


def wide_part(loop: list[Instruction]) -> float:
    """The part of the bytes loaded from global memory that comes 16 bytes at a time or in bulk."""
    loads = [i.width for i in loop if i.name.startswith(("LDGSTS.", "LDG."))]
    if any(i.name.startswith(("UTMALDG", "UBLKCP")) for i in loop):
        return 1.0
    return sum(w for w in loads if w >= 16) / max(1, sum(loads))


def facts(cubin: bytes, arch: int, warps: int, shared: int) -> dict[str, Any]:
    """One kernel of a cubin: what it occupies, and the mix of the whole and of its main loop."""
    used, code = resources(cubin), disassembled(cubin)
    loop = code.main_loop
    mix, count = Counter(i.family for i in loop), products(loop)
    part, binding = occupancy(arch, warps, used["REG"], shared)
    return {
        "warps": warps,
        "registers": used["REG"],
        "shared": shared,
        "spilled": used["LOCAL"] + sum(i.family == "local" for i in code.instructions),
        "occupancy": round(part, 3),
        "bound_by": binding,
        "instructions": len(code.instructions),
        "mix": dict(Counter(i.family for i in code.instructions).most_common()),
        "loop": dict(mix.most_common()),
        "tensor": sorted({i.name.split(".")[0] for i in loop if i.family == "tensor"}),
        "integers_per_product": round(mix["integer"] / count, 2) if count else None,
        "wide_loads": round(wide_part(loop), 3),
    }


def kernels(case: Case, arch: int) -> Iterator[dict[str, Any]]:
    """A row for each Triton kernel of forward and backward in bfloat16, compiled for `arch`."""
    from tests.emulator.triton import compiled

    inputs = case.inputs(torch.bfloat16)
    for name in case.grads:
        inputs[name].requires_grad_()
    with compiled(arch) as log, pyfast.using("triton"):
        out = getattr(pyfast, case.op)(**inputs)
        if case.grads:
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])
    for b in dict.fromkeys(launch.binary for launch in log):
        named = {"op": case.op, "case": case.name, "arch": ARCHITECTURES[arch], "kernel": b.name}
        yield named | facts(b.cubin, arch, b.num_warps, b.shared)


def line(row: dict[str, Any]) -> str:
    """One line of the table for people."""
    loop = " ".join(f"{count} {family}" for family, count in row["loop"].items())
    each = row["integers_per_product"]
    text = f"{row['kernel'].strip('_'):34}{row['arch']:8}{row['warps']:4}{row['registers']:6}"
    text += f"{row['shared']:8}{row['spilled']:7}{row['occupancy']:6.0%} {row['bound_by']:10}"
    return text + f"{'' if each is None else each:>6}  {loop}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sass", description=__doc__.split("\n")[0]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(backend.OPS)}")
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object here too")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in backend.OPS:
            parser.error(f"OP must be one of {', '.join(backend.OPS)}; got {op}")
    machine.expect_folder(parser, "--json", options.json)
    return options


def main() -> None:
    options = parse_arguments()
    print(
        f"{'kernel':34}{'arch':8}warps  regs  shared spilled  occupied by      int/mma  main loop"
    )
    rows: list[dict[str, Any]] = []
    for case in CALLS:
        if case.op in (options.ops or backend.OPS):
            print(case)
            for arch in options.arch:
                found = list(kernels(case, arch))
                print("\n".join(map(line, found)), flush=True)
                rows += found
    machine.finish({"bench": "sass", "rows": rows}, options.json)


if __name__ == "__main__":
    main()
