"""The bench of operations: its rows, their arithmetic, its errors and memory, its report."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import accuracy, ceilings, contestants, devices, errors, memory, ops, report, rows
from bench.timing import Timing
from pyfast import testing
from pyfast.testing import Case, adamw, cross_entropy, linear_act

CEILING = {
    "threads": 2,
    "copy_gb_per_s": 10.0,
    "matmul_gflops": {"float32": 100.0, "bfloat16": 400.0},
    "peak_gflops": {
        "fma_avx2": 64.0,
        "fma_avx512": 128.0,
        "avx512_bf16": 256.0,
        "amx_bf16": 1000.0,
    },
    "skipped": {},
}
SCHEMA = {"op", "case", "direction", "dtype", "shape", "backend", "threads", "ms", "rel_err"}
SCHEMA |= {"ratio_to_best_torch", "bytes", "flops", "pct_of_ceiling", "peak_mb"}


def job(**changes: object) -> rows.Job:
    """10 MB and 10 MFLOP in float32: 1 ms at the copy's bandwidth, 0.1 ms at the matmul's rate."""
    facts = {"op": "rope", "case": "2x3", "direction": "forward", "dtype": "float32"}
    facts |= {"shape": "x[2,3]", "threads": 2, "bytes": 10**7, "flops": 10**7, "calls": {}}
    return rows.Job(**(facts | changes))


def made_up_rows(ours: float = 2e-3, **changes: object) -> list[dict]:
    times = {"pyfast": Timing((ours,) * 3), "eager": Timing((4e-3,) * 3)}
    times["compile"] = Timing((3e-3,) * 3)
    return rows.rows(job(**changes), times, CEILING)


def document(*found: dict, **told: str) -> dict:
    """What bench.ops would write about these rows."""
    machine = {"cpu": "a made-up CPU", "logical_cpus": 2, "torch": "2.13", "date": "today"}
    machine |= {"torch_capability": "AVX2", "pyfast": "built", "load": [0, 0, 0], "command": "c"}
    machine |= {"isa": "best", "thp": "off", "huge_pages": "never", "environment": {}} | told
    limits = {"2": CEILING}
    return {
        "bench": "ops",
        "machine": machine,
        "ceilings": limits,
        "failures": [],
        "rows": list(found),
    }


def test_rows_tell_ratios_to_the_best_of_torch() -> None:
    found = {row["backend"]: row for row in made_up_rows()}
    assert {name: row["best_torch"] for name, row in found.items()} == dict.fromkeys(
        found, "compile"
    )
    ratios = {name: row["ratio_to_best_torch"] for name, row in found.items()}
    assert ratios == {"pyfast": 1.5, "compile": 1.0, "eager": 0.75}


def test_rows_tell_which_ceiling_binds_and_how_near_it_is() -> None:
    by_copy = made_up_rows()[0]
    assert (by_copy["binds"], by_copy["pct_of_ceiling"]) == ("copy", 50.0)
    by_matmul = made_up_rows(flops=10**8 * 15 // 10)[0]  # 1.5 ms at 100 GFLOP/s
    assert (by_matmul["binds"], by_matmul["pct_of_ceiling"]) == ("matmul", 75.0)
    assert by_matmul["peak_loop"] == "fma_avx512"
    assert by_matmul["pct_of_peak"] == pytest.approx(100 * 75 / 128, rel=1e-3)


def test_only_bfloat16_is_held_against_what_multiplies_it() -> None:
    without = CEILING["peak_gflops"] | {"amx_bf16": None}
    narrow = ceilings.peak_rate(CEILING | {"peak_gflops": without}, "bfloat16")
    assert narrow == ("avx512_bf16", 256.0)
    assert ceilings.peak_rate(CEILING, "bfloat16") == ("amx_bf16", 1000.0)
    assert ceilings.peak_rate(CEILING, "float16") == ("fma_avx512", 128.0)
    assert ceilings.peak_rate(CEILING | {"peak_gflops": {"amx_bf16": None}}, "bfloat16") is None


def test_slow_16_bit_matmul_is_no_excuse() -> None:
    slow = CEILING | {"matmul_gflops": {"float32": 100.0, "bfloat16": 20.0}}
    assert ceilings.matmul_rate(slow, "bfloat16") == 100.0


def test_rows_without_a_torch_contestant_have_no_ratio() -> None:
    row = rows.rows(job(), {"pyfast": Timing((1e-3,))}, CEILING)[0]
    assert row["ratio_to_best_torch"] is None and row["best_torch"] is None
    assert "rope 2x3" in rows.line([row])
    json.loads(json.dumps(row, allow_nan=False))


def test_summary_counts_losses() -> None:
    found = made_up_rows() + made_up_rows(ours=6e-3)
    assert rows.summary(found).startswith("2 rows: 1 at or above the best of torch, 1 below")


def test_work_of_a_training_step_has_both_directions() -> None:
    case = linear_act(2, 3, 5, "relu")
    assert ops.work(case, "forward", "float32") == (4 * (6 + 15 + 10), 60)
    assert ops.work(case, "forward+backward", "bfloat16") == (3 * 2 * (6 + 15 + 10), 180)


def test_relative_error_is_against_the_largest_truth() -> None:
    truth = torch.tensor([0.0, -4.0, float("inf")], dtype=torch.float64)
    value = torch.tensor([1.0, -4.0, float("inf")])
    assert errors.relative_error(value, truth) == 0.25
    assert errors.relative_error(value[:0], truth[:0]) == 0.0


def test_peak_memory_of_a_call_is_measured() -> None:
    if not memory.reset_peak():
        pytest.skip("needs /proc/self/clear_refs")
    size = 2**22  # float32: 16 MB, two of them alive at once
    peak = memory.extra_peak(lambda: torch.ones(size).exp().sum())
    assert peak == pytest.approx(2 * 4 * size, rel=0.05)
    assert memory.extra_peak(lambda: None) < 2**20


def test_training_calls_have_fresh_gradients() -> None:
    case = cross_entropy(5, 7)
    call = contestants.contestants(case)["eager"](case.inputs(torch.float32), contestants.TRAINING)
    first = dict(call())["grad_input"].clone()
    assert first.abs().sum() > 0
    assert torch.equal(dict(call())["grad_input"], first)  # not the sum of two


@pytest.mark.parametrize("name", ["eager", "fused"])
def test_torch_adamw_takes_the_same_step(name: str) -> None:
    case = adamw(((5, 7), (3,)), max_norm=0.5, maximize=True, decoupled=False, lr=0.1)
    inputs = case.inputs(torch.float32)
    exact = errors.truth(case, inputs, contestants.STEP)
    binder = contestants.contestants(case)[name]
    values = binder(contestants.copied(inputs), contestants.STEP)()
    assert errors.worst_error(values, exact) < 1e-5


def test_peak_loops_run_or_say_why_not() -> None:
    rates, skipped = ceilings.peak_rates(threads=1)
    assert set(rates) == set(ceilings.PEAKS)
    for name, rate in rates.items():
        assert (rate is None) == (name in skipped)
        assert rate is None or rate > 0.1  # GFLOP/s
    assert set(ceilings.peak_rates(1, "avx2")[1]) >= {"fma_avx512", "amx_bf16"}


def test_peak_loops_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(ceilings.shutil, "which", lambda name: None)
    rates, skipped = ceilings.peak_rates(1)
    assert set(rates.values()) == {None}
    assert set(skipped.values()) == {"there is no C++ compiler (g++)"}


def run_ops(monkeypatch, capsys, arguments: str, found: list[Case]) -> tuple[str, dict]:
    """The table and the JSON object of a run on small ceilings and these cases."""
    limits = CEILING | {"matmul_gflops": dict.fromkeys(ops.DTYPES, 100.0)}
    monkeypatch.setattr(ops, "cases", lambda op, *_: [c for c in found if c.op == op])
    monkeypatch.setattr(ops.ceilings, "measure_ceilings", lambda *_: limits)
    monkeypatch.setattr(ops, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["ops", *arguments.split()])
    threads = torch.get_num_threads()
    try:
        ops.main()
    finally:
        torch.set_num_threads(threads)
    *lines, last = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(last)


def test_bench_ops_prints_rows_and_json(monkeypatch, capsys, tmp_path) -> None:
    tiny = [linear_act(5, 4, 3, "relu"), adamw(((5, 7), (3,)))]
    file = tmp_path / "ops.json"
    arguments = f"linear_act adamw_step_ mlp_step --quick --threads 1 --json {file}"
    text, result = run_ops(monkeypatch, capsys, arguments, tiny)
    assert json.loads(file.read_text()) == result and list(tmp_path.iterdir()) == [file]
    assert all(row.keys() >= SCHEMA for row in result["rows"])
    told = {(row["op"], row["direction"], row["dtype"], row["backend"]) for row in result["rows"]}
    for dtype in ("float32", "bfloat16"):
        for name in ("pyfast", "eager"):
            assert ("linear_act", "forward", dtype, name) in told
            assert ("linear_act", "forward+backward", dtype, name) in told
        assert ("adamw_step_", "step", dtype, "fused") in told
    assert ("mlp_step", "step", "float32", "pyfast") in told
    assert all(row["rel_err"] < 0.1 and row["ms"] > 0 for row in result["rows"])
    assert "linear_act 5x4->3 relu" in text and "3 threads" not in text


def test_bench_ops_survives_a_compiler_that_fails(monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler today\nand a long story")

    monkeypatch.setattr(contestants.torch, "compile", lambda *_, **__: fail)
    case = linear_act(5, 4, 3, "relu")
    arguments = "linear_act --compile --quick --threads 1 --dtypes float32"
    text, result = run_ops(monkeypatch, capsys, arguments, [case])
    assert "compile left out: no compiler today" in text
    assert len(result["failures"]) == 2
    assert {row["backend"] for row in result["rows"]} == {"pyfast", "eager"}


def test_hopeless_contestants_are_left_out(capsys) -> None:
    bench = ops.Bench.__new__(ops.Bench)
    bench.failures, bench.device = [], devices.CPU
    naps = {"pyfast": 0.2, "eager": 0.001, "chunked": 0.1}
    calls = {name: lambda s=seconds: time.sleep(s) for name, seconds in naps.items()}
    found = job(calls=calls)
    bench.drop_hopeless(found, seconds=0.05)
    assert list(found.calls) == ["pyfast", "eager"]  # ours stays, however slow
    assert bench.failures[0]["backend"] == "chunked"
    assert "chunked left out: " in capsys.readouterr().out


def test_compiler_that_hangs_is_given_up() -> None:
    with pytest.raises(TimeoutError, match=r"took more than 0\.05 s"), contestants.at_most(0.05):
        while True:
            pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("no_such_op", "OP must be one of linear_act, "),
        ("--threads 0", "--threads must be at least 1; got 0"),
        ("--json /no/such/folder/x.json", "--json must be in a folder that exists; got /no/such"),
    ],
)
def test_bench_ops_refuses(arguments: str, words: str, capsys) -> None:
    with pytest.raises(SystemExit):
        ops.parse_arguments(arguments.split())
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_full_run_has_compile_and_one_thread() -> None:
    full, quick = ops.parse_arguments([]), ops.parse_arguments(["--quick"])
    assert full.compile and not quick.compile
    assert full.threads[0] == 1 and quick.threads == [torch.get_num_threads()]


def test_report_takes_the_worse_of_two_runs_and_says_where_we_lose(tmp_path) -> None:
    won, lost = made_up_rows(), made_up_rows(ours=6e-3)
    other = made_up_rows(case="9x9 wide")
    files = [tmp_path / name for name in ("first.json", "again.json", "pages.json")]
    files[0].write_text(json.dumps(document(*won, *other)))
    files[1].write_text(json.dumps(document(*lost, *other)))
    files[2].write_text(json.dumps(document(*won, thp="on")))
    out = tmp_path / "REPORT.md"
    report.main([*map(str, files), "--out", str(out)])
    text = out.read_text()
    lose = text.split("## Where we lose")[1].split("\n## ")[0]
    assert "| 0.50 (0.50 to 0.50) | compile |" in lose and "9x9" not in lose
    assert "3 rows, 1 of them below 1." in text
    assert "## Every row: instruction set best, huge pages on" in text
    for name in report.PICTURES:
        assert (tmp_path / name).read_text().startswith("<?xml")


def test_report_tells_of_training(tmp_path) -> None:
    trained = {"bench": "train", "machine": document()["machine"], "model": "gpt2-124m"}
    trained |= {"batch_size": 4, "context_length": 512, "threads": 2, "dtypes": ["bfloat16"]}
    trained["bfloat16"] = {
        "ratio": [2.5, 2.4, 2.6],
        "contestant": "torch autocast",
        "shares": {"pyfast": {"matmul": 50.0, "amx_bf16": 40.0}},
        "peak_mb": {"pyfast": 300.0, "torch autocast": 600.0},
        "agree": True,
    }
    report.write([trained], tmp_path / "REPORT.md")
    text = (tmp_path / "REPORT.md").read_text()
    assert "2.50 (2.40 to 2.60) of torch autocast; 50% of matmul, 40% of amx_bf16" in text
    assert "peak memory 0.50x; the loss curves agree" in text


def test_report_refuses_other_files(tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.json"
    file.write_text("[]")
    with pytest.raises(SystemExit):
        report.main([str(file)])
    assert f"FILE must be JSON of bench.ops or bench.train; got {file}" in capsys.readouterr().err


def test_accuracy_stands_beside_torchs(monkeypatch, capsys) -> None:
    arguments = "linear_act adamw_step_ --dtypes float32"
    monkeypatch.setattr(accuracy, "cases", lambda op: testing.cases(op)[:1])
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments.split()])
    accuracy.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["rows"]
    tensors = {row["tensor"] for row in found if row["op"] == "linear_act"}
    assert tensors == {"output 0", "grad_x", "grad_weight", "grad_bias"}
    assert all(0 <= row["rel_err"] < 1e-5 and row["torch_rel_err"] < 1e-5 for row in found)
    assert sum(line.startswith("linear_act") for line in lines) == 2  # output and gradient
