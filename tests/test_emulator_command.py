"""python -m tests.emulator FILE.py: a user's own Triton script."""

from pathlib import Path

import pytest
import torch

from tests.emulator import library

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")

SCRIPT = """
import sys, torch, triton, triton.language as tl

@triton.jit
def twice(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < {limit})
    tl.store(out_ptr + offs, 2 * x, mask=offs < n)

x, out = torch.randn(1000), torch.empty(1000)
for _ in range(2):
    twice[(8,)](x, out, 1000, 128)
assert torch.equal(out, 2 * x) and sys.argv[1:] == ["--own", "3"]
"""


def run(tmp_path: Path, limit: str) -> int:
    from tests.emulator.__main__ import main

    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(limit=limit))
    return main([str(script), "--arch", "90", "--own", "3"])


def test_script_runs_and_its_counters_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, "n") == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["kernel", "launches"]
    assert row.split()[:2] == ["twice", "2"] and " 0.008 " in row  # MB each way


def test_violation_is_told_with_line_and_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, "n + 24") == 1
    told = capsys.readouterr().err
    assert "out of bounds" in told and "script.py:7" in told and "x_ptr[1000]" in told


def test_script_for_a_gpu_runs_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A device "cuda" in it is the CPU; what it raises itself is told without other frames."""
    from tests.emulator.__main__ import main

    script = tmp_path / "script.py"
    lines = SCRIPT.format(limit="n").replace("(1000)", '(1000, device="cuda")').splitlines()[:-1]
    lines += [
        "assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (8, 0)",
        "layer = torch.nn.Linear(2, 2, device=torch.device('cuda', 0)).to('cuda:0').cuda()",
        "torch.cuda.synchronize()",
        "torch.testing.assert_close(out.to('cuda'), 3 * x)",
    ]
    script.write_text("\n".join(lines))
    available = torch.cuda.is_available
    assert main([str(script)]) == 1
    told = capsys.readouterr()
    assert "twice" in told.out and "not close" in told.err
    assert "script.py" in told.err and "runpy" not in told.err
    assert torch.cuda.is_available is available


def test_file_that_is_not_there_is_told_in_one_sentence(capsys: pytest.CaptureFixture) -> None:
    from tests.emulator.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["nothing.py"])
    assert ended.value.code == 2
    assert "FILE must be a script; got nothing.py, which is not there" in capsys.readouterr().err
