"""bench.sass reads what was compiled; bench.gpu_model continues counters, and says model."""

import json
import sys

import pytest
import torch

from bench import gpu_model, liger, sass, torch_sequence
from bench.gpu_model import GPUS, WORKS, Work, continued, launches, seconds
from pyfast import backend, testing
from tests.emulator import Stats

triton = pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)


def last_line(module, arguments: list[str], monkeypatch, capsys) -> tuple[str, dict]:
    """(all that is printed, the JSON object at its end)."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    module.main()
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


def test_sass_tells_what_was_compiled(monkeypatch, capsys) -> None:
    text, told = last_line(sass, ["rope", "--arch", "80", "90"], monkeypatch, capsys)
    assert "rope_kernel" in text and {row["arch"] for row in told["rows"]} == {"sm_80", "sm_90a"}
    for row in told["rows"]:
        assert row["spilled"] == 0 and 16 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1
        assert sum(row["mix"].values()) == row["instructions"] and row["mix"]["global"] > 0


def test_sass_knows_widths_and_products() -> None:
    widths = {"LDGSTS.E.BYPASS.128": 16, "LDG.E.U16": 2, "LDG.E.64": 8, "STG.E": 4, "LDG.E.S8": 1}
    for name, width in widths.items():
        assert sass.Instruction(name, "").width == width
    loop = [
        sass.Instruction("HGMMA.64x256x16.F32.BF16", ""),
        sass.Instruction("HMMA.16816.F32", ""),
    ]
    assert sass.products(loop) == 64 * 256 * 16 / (16 * 8 * 16) / 4 + 1
    assert sass.occupancy(80, 8, 128, 0) == (0.25, "registers")
    assert sass.occupancy(90, 4, 32, 100 << 10) == (0.125, "shared")


def test_every_op_is_in_both() -> None:
    assert {case.op for case in sass.CALLS} == {work.op for work in WORKS} == set(backend.OPS)


def test_counters_are_continued_to_those_of_the_larger_size() -> None:
    work = Work("rope", lambda n: testing.rope(n, 2, 16, 16), 5, (1, 2))
    same = Work("rope", work.case, 5, (5, 6))
    for far, near in zip(
        launches(gpu_model.ours, work, 80), launches(gpu_model.ours, same, 80), strict=True
    ):
        for name in ("load_bytes", "store_sectors", "distinct_written", "warp_instructions"):
            assert getattr(far, name) == getattr(near, name), name


def test_the_slowest_resource_binds() -> None:
    gpu = GPUS["H100"]
    memory = Stats(distinct_read=3_350_000_000)
    time, binds = seconds(gpu, memory)
    assert binds == "memory" and time == pytest.approx(1e-3 / 0.92 + gpu_model.LAUNCH)
    both = continued(memory, memory, (1, 2), 9) + Stats(mma_flops=10**13)
    assert seconds(gpu, both)[1] == "tensor"


def test_unfused_attention_moves_its_scores() -> None:
    told = torch_sequence.passes(testing.attention(1, 2, 64, 16))
    assert sum(p.flops for p in told) == 6 * 2 * 2 * 64 * 64 * 16
    assert all(p.bytes >= 2 * 2 * 64 * 64 for p in told)
    for work in WORKS:
        assert torch_sequence.passes(work.case(work.small[0]))


def test_liger_is_charged_for_what_it_leaves_to_torch() -> None:
    case = testing.norm("layer_norm", 8, 64)
    told = liger.passes(case, 100)
    assert [p.what.split(",")[0] for p in told] == ["sum", "to bfloat16"] * 2
    assert told[0].bytes == 4 * 64 * 101
    assert len(liger.passes(testing.norm("rms_norm", 8, 64), 100)) == 2
    assert liger.passes(testing.cross_entropy(8, 64), 100) == []


def test_gpu_model_labels_every_number(monkeypatch, capsys) -> None:
    text, told = last_line(gpu_model, ["rope", "--gpu", "A100"], monkeypatch, capsys)
    assert {row["label"] for row in told["rows"]} == {told["label"]} == {"model, not measured"}
    assert {row["who"] for row in told["rows"]} == {"pyfast", "torch unfused"}
    times = [line for line in text.splitlines() if " us " in line]
    assert len(times) == 2 and all("model, not measured" in line for line in times)
    assert torch.get_default_device().type == "cpu"
