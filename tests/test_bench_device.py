"""`make gpu` without a GPU: its clock, its steps, ncu's counters beside ours, its page."""

import json
import re
import sys
from datetime import datetime

import pytest
import torch

from bench import cases, counters, devices, gpu, gpu_page, ops, others, rows
from bench.timing import Timing, interleave
from pyfast import testing


class Recorder(devices.Emulator):
    """Writes down in which order things happen on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        recorder = self

        class Event(devices._HostEvent):
            def record(self) -> None:
                recorder.order.append("event")
                super().record()

        class Spill:
            def zero_(self) -> None:
                recorder.order.append("spill")

        self._event, self._spill = Event, Spill()

    def _wait(self) -> None:
        self.order.append("wait")


def test_gpu_clock_empties_level_2_before_each_call_and_waits_only_outside() -> None:
    device = Recorder()
    seconds = device.seconds(lambda: device.order.append("call"), 2)
    one = ["spill", "event", "call", "event"]
    assert device.order == ["wait", *one, *one, "wait"]
    assert 0 <= seconds < 1


def test_contexts_of_contestants_are_not_timed() -> None:
    entered = []

    def context():
        entered.append(1)
        return devices.contextlib.nullcontext()

    call = devices.Within(context, lambda: 7)
    assert call() == 7
    interleave({"a": call}, rounds=3, warmup=1, repeat=False)
    assert len(entered) == 1 + 1 + 3  # once for each sample


def test_every_backend_of_ours_is_ours() -> None:
    times = {
        n: Timing((s,)) for n, s in {"pyfast": 3.0, "pyfast triton": 1.0, "eager": 2.0}.items()
    }
    assert rows.best_torch(times) == "eager"


def test_bench_refuses_a_gpu_that_is_not_there(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="--device cuda must find a GPU"):
        devices.Cuda()
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "must find a GPU; torch sees none; --dry-run needs none" in capsys.readouterr().err


LOG = [
    {"kernel": "rope_kernel", "grid": [32, 2, 1]} | dict.fromkeys(counters.METRICS, 4096),
    {"kernel": "norm_kernel", "grid": [8, 1, 1]} | dict.fromkeys(counters.METRICS, 7),
]
FOREIGN = '"9","fill_kernel","(1, 1, 1)","smsp__inst_executed.sum","","12"\n'


def test_ncu_is_read_launch_by_launch() -> None:
    text = counters.as_ncu_writes(LOG)
    assert '"4,096"' in text and text.startswith("==PROF==")
    told = counters.compared(counters.read_ncu(text + FOREIGN), LOG)
    assert told["problems"] == []  # what is not ours is passed over
    assert told["rows"][0]["load_sectors"] == [4096, 4096] and told["rows"][1]["us"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: log[0].update(load_sectors=4300), "rope_kernel: load_sectors 4096, emulated"),
        (
            lambda log: log[0].update(grid=[31, 2, 1]),
            r"launched rope_kernel \[32, 2, 1\], emulated",
        ),
        (lambda log: log.pop(), "3 launches, emulated 2"),
    ],
    ids=["sectors", "grid", "launches"],
)
def test_what_ncu_counts_otherwise_is_told(change, words) -> None:
    there = counters.read_ncu(counters.as_ncu_writes(LOG + LOG[:1]))
    here = [dict(launch) for launch in LOG + LOG[:1]]
    change(here)
    assert re.search(words, "\n".join(counters.compared(there, here)["problems"]))


def test_steps_name_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    real = {step.name: step for step in gpu.steps(False, tmp_path)}
    assert real["counters"].missing == "ncu is not found"
    assert real["sanitizer racecheck"].missing == "compute-sanitizer is not found"
    assert not real["tests"].missing and not real["ops"].missing
    assert not any(step.missing for step in gpu.steps(True, tmp_path))
    assert [s.name for s in gpu.steps(True, tmp_path)] == list(real)


def made_up_step(program: str, **facts) -> gpu.Step:
    return gpu.Step("made up", [sys.executable, "-c", program], 1, **facts)


def test_steps_that_fail_or_hang_do_not_stop_the_others(monkeypatch, capsys) -> None:
    told = gpu.run(made_up_step("print('so far'); raise SystemExit(3)"), {})
    assert told["status"] == 3 and told["tail"] == "so far\n"
    monkeypatch.setattr(gpu, "MINUTE", 0.01)
    assert gpu.run(made_up_step("import time; time.sleep(60)"), {})["status"] < 0
    assert gpu.run(made_up_step("", missing="no such tool"), {}) == {"left_out": "no such tool"}


def test_run_writes_its_json_and_page(monkeypatch, tmp_path, capsys) -> None:
    def few(dry: bool, folder):
        file = folder / "ops.json"
        yield made_up_step("import sys; sys.exit(1)")
        yield gpu.Step(
            "ops", [sys.executable, "-c", f"open({str(file)!r}, 'w').write('{{}}')"], 1, result=file
        )

    monkeypatch.setattr(gpu, "steps", few)
    monkeypatch.setenv("PYFAST_CUDA", "0")
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    (page,), (file,) = tmp_path.glob("emulator-*.md"), tmp_path.glob("emulator-*.json")
    assert "| made up | failed (1) |" in page.read_text()
    found = json.loads(file.read_text())
    assert found["results"]["ops"] == {} and found["steps"]["ops"]["status"] == 0
    assert "failed: made up" in capsys.readouterr().out


def test_page_tells_who_was_quicker_and_where_we_lose() -> None:
    def row(name: str, ms: float, **more) -> dict:
        base = {"op": "rope", "case": "2x3", "dtype": "bfloat16", "direction": "forward"}
        return base | {"threads": 1, "backend": name, "ms": ms, "binds": "copy"} | more

    shares = {"pct_of_ceiling": 50.0}
    told = [
        row("pyfast", 2.0, **shares),
        row("pyfast cuda", 1.5, **shares),
        row("eager", 1.0, **shares),
    ]
    lines = "\n".join(gpu_page.timed({"rows": told, "failures": []}))
    assert "| 0.50 | 50% of copy | pyfast 2, pyfast cuda 1.5, **eager 1** |" in lines
    assert "### Below 1: 1 rows" in lines and "| 0.50 of eager |" in lines


def test_files_are_named_after_gpu_and_day() -> None:
    day = datetime(2026, 1, 31)
    assert gpu.file_stem("NVIDIA H100 80GB HBM3", day) == "nvidia-h100-80gb-hbm3-2026-01-31"


def test_other_libraries_take_part_on_a_gpu_only() -> None:
    case = testing.cases("attention")[0]
    assert others.functions(case, devices.CPU) == {}
    fake = type("Gpu", (), {"type": "cuda"})()
    assert {"sdpa flash", "sdpa efficient", "sdpa cudnn"} <= others.functions(case, fake).keys()
    assert others.fits_flash_attention(case)
    uneven = testing.attention(1, 2, 3, 16, tk=5, causal=True)
    assert not others.fits_flash_attention(uneven)
    assert not others.fits_liger(testing.norm("layer_norm", 3, 5, residual=True))


def test_gpu_has_cases_of_its_own() -> None:
    assert {case.op for case in cases.cases(device="cuda")} == {*ops.OPS} - {"mlp_step"}
    assert len(cases.cases(quick=True, device="cuda")) < len(cases.cases(device="cuda"))
