"""What the emulator's README says it models and does not is so, and a fresh shell runs a script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.emulator import Module, library
from tests.emulator.module import Unsupported

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "tests" / "emulator" / "README.md").read_text()
PTX = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out) {{
  .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .f32 %f<16>; .reg .b16 %h<4>;
  .shared .align 16 .b8 memory[1024];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; mov.u32 %r5, memory;
  {instruction}
  ret;
}}
"""
# (word of the README's list of what is not modelled, such an instruction)
ABSENT = {
    "tcgen05": "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 32;",
    "textures": "tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1}];",
    "surfaces": "suld.b.1d.b32.trap %r1, [%rd1, {%r2}];",
    "sparse": "mma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3, %r4}, {%f1, %f2, %f3, %f4}, %r1, 0x0;",
    "4-bit mma": "mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%r1, %r2}, {%r3}, {%r4}, "
    "{%r1, %r2};",
}
NOTHING = {  # said to do nothing
    "griddepcontrol": "griddepcontrol.wait;",
    "prefetches": "prefetch.global.L2 [%rd1];",
}


def run(instruction: str) -> None:
    module = Module(PTX.format(instruction=instruction))
    module.launch("kernel", 1, 32, [torch.zeros(32)])


@pytest.mark.parametrize("word", ABSENT)
def test_what_is_not_modelled_is_refused(word: str) -> None:
    """And not run as something else."""
    (listed,) = re.findall(r"\*\*Not modelled:\*\*(.*?)\.\s", README, re.DOTALL)
    assert word in " ".join(listed.split())
    with pytest.raises(Unsupported, match=ABSENT[word].split(".")[0]):
        run(ABSENT[word])


@pytest.mark.parametrize("word", NOTHING)
def test_what_does_nothing_runs(word: str) -> None:
    assert word in README
    run(NOTHING[word])


def test_every_file_the_readme_names_is_there() -> None:
    for name in re.findall(r"`(\w+\.(?:cpp|py|h))`", README):
        assert list((ROOT / "tests" / "emulator").rglob(name)), name


SCRIPT = """
import torch, triton, triton.language as tl

@triton.jit
def softmax_kernel(x, out, cols, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    at = tl.program_id(0) * cols + offs
    v = tl.load(x + at, mask=offs <= cols, other=-float("inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(out + at, v / tl.sum(v, 0), mask=offs < cols)

x = torch.randn(4, 100, device="cuda")
softmax_kernel[(4,)](x, torch.empty_like(x), 100, BLOCK=128)
"""


def test_a_fresh_shell_tells_what_is_wrong_and_where(tmp_path: Path) -> None:
    """One column too many: the tensor and the element, the line, the block and the lane."""
    pytest.importorskip("triton", reason="needs triton")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    command = [sys.executable, "-m", "tests.emulator", str(script), "--arch", "90"]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out of bounds: read of 4 bytes at x[400]" in done.stderr
    assert "script.py:8, block (3, 0, 0), warp 3 lane 4" in done.stderr
