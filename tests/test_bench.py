"""The timing is fair in its order; the bench of training runs, judges and ends in one JSON line."""

import json
import subprocess
import sys
import time

import pytest

from bench import machine, timing, train, trainers
from pyfast.models import GPTConfig

TINY = "--steps 6 --batch-size 2 --context-length 16 --vocab-size 300"
TINY += " --n-layer 2 --n-head 2 --n-embd 32"


def test_interleave_takes_turns_and_turns_round() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.interleave(calls, rounds=3, warmup=1, repeat=False)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert all(len(times[name].samples) == 3 for name in calls)


def test_interleave_repeats_short_calls() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    times = timing.interleave({"short": call}, rounds=2, warmup=1)
    assert count > 100
    assert times["short"].median < timing.MIN_SAMPLE


def test_settled_allocator_keeps_its_pages() -> None:
    """In a process of its own: what this one has freed before would settle its allocator."""
    script = """
import ctypes, resource, sys
from bench.memory import settle_allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def call():
    pieces = [libc.malloc(2**20) for _ in range(8)]
    for piece in pieces:
        ctypes.memset(piece, 0, 2**20)
    for piece in pieces:
        libc.free(piece)
if sys.argv[1] == "settled":
    settle_allocator()
call(), call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    told = [
        subprocess.run([sys.executable, "-c", script, state], capture_output=True, text=True)
        for state in ("settled", "fresh")
    ]
    settled, fresh = (int(one.stdout) for one in told)
    assert settled < 100
    assert fresh > 1000, "glibc returns pages as it did when this was written"


def test_ratio_is_paired_round_by_round() -> None:
    slow, quick = timing.Timing((2.0, 4.0, 8.0)), timing.Timing((1.0, 2.0, 4.0))
    assert timing.ratio(slow, quick) == (2.0, 2.0, 2.0)


def test_bench_train_curves_agree(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *TINY.split()])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exit_.value.code == 0
    for dtype in ("float32", "bfloat16"):
        losses = result[dtype]["losses"]["pyfast"]
        assert result[dtype]["agree"] and len(losses) == 6 and losses[-1] < losses[0]


def test_bench_train_refuses_too_few_steps(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "3"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--steps must be more than 3, the untimed first ones; got 3" in capsys.readouterr().err


def test_interleave_keeps_to_its_budget() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        time.sleep(0.01)

    times = timing.interleave({"slow": call}, rounds=1000, warmup=100, budget=0.05)
    assert timing.MIN_ROUNDS <= len(times["slow"].samples) <= 5
    assert count <= 12


def test_judge_without_a_truth_judges_nothing() -> None:
    assert train.judge({"pyfast": [1.0], "torch": [2.0]}, None, "torch")["agree"] is None


def test_judge_holds_ours_against_the_twin() -> None:
    losses = {"pyfast": [1.3], "torch": [1.1], "torch autocast": [1.9]}
    assert not train.judge(losses, [1.0], "torch")["agree"]
    assert train.judge(losses | {"pyfast": [1.15]}, [1.0], "torch")["agree"]


def test_shares_come_from_the_models_flops() -> None:
    ceiling = {"matmul_gflops": {"float32": 100.0}, "peak_gflops": {"fma_avx2": 200.0}}
    ceiling["peak_gflops"]["amx_bf16"] = None
    result = {"ms": {"pyfast": [1000.0, 900.0, 1100.0]}}
    found = train.shares(result, 50 * 10**9, "float32", ceiling)
    assert found == {"pyfast": {"matmul": 50.0, "fma_avx2": 25.0}}


def test_gpt2_124m_has_its_known_flops() -> None:
    options = train.parse_arguments(["--model", "gpt2-124m"])
    assert (options.batch_size, options.context_length, options.limits) == (4, 512, True)
    config = train.config_of(options)
    # 6 x 123.5 million weights in products x 2048 tokens, and attention's few percent
    assert trainers.step_flops(config, 4, 512) == pytest.approx(1.586e12, rel=1e-2)


def test_peak_of_a_step_holds_the_weights_and_their_gradients() -> None:
    config = GPTConfig(vocab_size=4000, n_positions=16, n_embd=256, n_layer=2, n_head=2)
    peak = trainers.peak_of_step("pyfast", config, "float32", 2, 16, 1)
    if peak is None:
        pytest.skip("needs /proc/self/clear_refs")
    weights = 4 * 2.6e6
    assert 3.5 * weights < peak < 8 * weights  # weights, gradients, two moments; some activations


def test_options_become_settings_of_a_new_process() -> None:
    assert machine.wanted_environment(None, None) == {}
    assert machine.wanted_environment(None, "on") == {"THP_MEM_ALLOC_ENABLE": "1"}
    assert machine.wanted_environment(None, None, pinned=True) == machine.PINNED
    assert machine.wanted_environment("avx2", None)["PYFAST_CPU_ISA"] == "avx2"
