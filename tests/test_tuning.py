"""The measured choice, on the CPU: made-up times, and candidates that are CPU kernels."""

import contextlib
import json
import logging
import warnings

import pytest
import torch

import pyfast
from pyfast import backend, choosers, cli, testing, tune, tuning
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import emulated

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Clock:
    """Runs a call once; its seconds are those of the candidate that it ran."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.ran, self.measured = seconds, [], 0

    def candidate(self, name: str, run):
        def call(*args):
            self.ran.append(name)
            return run(*args)

        return call

    def __call__(self, run) -> float:
        self.measured += 1
        run()
        return self.seconds[self.ran[-1]]


@contextlib.contextmanager
def choosing(clock: Clock, path, *schemas: str):
    """A choosing room for CPU tensors over two candidates: the kernel under two names."""
    winners = tuning.Winners(path, clock=clock)
    found = {}
    for schema in schemas:
        kernel = torch.library.get_kernel(f"pyfast::{schema}", "CPU")
        run = choosers.functools.partial(kernel.call_boxed, CPU)
        found[schema] = {name: clock.candidate(name, run) for name in clock.seconds}
    library = choosers.register("CPU", found, winners)
    try:
        yield winners
    finally:
        library._destroy()


def norm(rows: int = 3, cols: int = 8) -> torch.Tensor:
    return pyfast.rms_norm(torch.ones(rows, cols), (cols,))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "tuning.json"


def test_quickest_candidate_is_measured_once_and_kept(file) -> None:
    clock = Clock(cuda=2e-6, triton=1e-6)
    with choosing(clock, file, "rms_norm") as winners:
        out = norm()
        assert clock.ran == ["cuda", "triton", "triton"]  # two trials, then the call itself
        norm(), norm(4, 7)  # the same bucket of sizes
        assert clock.measured == 2 and clock.ran[3:] == ["triton", "triton"]
        norm(300)  # another
        assert clock.measured == 4
    assert torch.equal(out, norm())
    assert set(winners.known.values()) == {"triton"} and len(winners.known) == 2
    again = Clock(cuda=1e-6, triton=2e-6)
    with choosing(again, file, "rms_norm"):
        norm()
    assert again.measured == 0 and again.ran == ["triton"]  # from the file


def test_sizes_without_end_are_not_all_remembered(file, monkeypatch) -> None:
    monkeypatch.setattr(choosers, "REMEMBERED", 3)
    asked, clock, real = [], Clock(cuda=2e-6, triton=1e-6), tuning.describe
    monkeypatch.setattr(tuning, "describe", lambda *a: (asked.append(1), real(*a))[1])
    with choosing(clock, file, "rms_norm"):
        for cols in (9, 10, 11, 12, 12, 12, 9):
            norm(4, cols)
    assert len(asked) == 5 and clock.measured == 2  # what was forgotten is looked up again


def test_winners_of_other_sources_are_measured_anew(file, monkeypatch) -> None:
    with choosing(Clock(cuda=2e-6, triton=1e-6), file, "rms_norm"):
        norm()
    monkeypatch.setattr(tuning.build, "source_hash", lambda *_: "changed")
    clock = Clock(cuda=1e-6, triton=2e-6)
    with choosing(clock, file, "rms_norm"):
        norm()
    assert clock.measured == 2 and clock.ran[-1] == "cuda"
    assert json.loads(file.read_text())["version"].startswith("changed")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"winners": {}}'])
def test_broken_file_is_passed_over_with_one_warning(file, text) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with choosing(Clock(cuda=2e-6, triton=1e-6), file, "rms_norm") as winners:
        with pytest.warns(UserWarning, match="is no file of measured winners"):
            norm()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            norm(300)
    assert len(json.loads(file.read_text())["winners"]) == len(winners.known) == 2


def test_cache_that_cannot_be_written_does_not_stop_the_call(file) -> None:
    file.parent.write_text("a file where the folder should be")
    with choosing(Clock(cuda=2e-6, triton=1e-6), file, "rms_norm"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert norm().shape == (3, 8)


def test_what_another_process_has_measured_is_kept(file) -> None:
    here, there = (tuning.Winners(file, clock=Clock(a=1.0)) for _ in range(2))
    assert not here.known and not there.known  # both have read the file
    there.keep("theirs", {"x": 1.0})
    here.keep("ours", {"y": 1.0})
    assert json.loads(file.read_text())["winners"] == {"ours": "y", "theirs": "x"}
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_candidate_that_fails_does_not_win(file) -> None:
    def fail(*_):
        raise RuntimeError("out of memory")

    winners = tuning.Winners(file, clock=lambda run: run() or 1.0)
    room = choosers.chooser("rms_norm", {"cuda": fail, "triton": lambda *_: 7.0}, winners)
    assert room(torch.ones(2)) == 7.0
    broken = choosers.chooser("layer_norm", {"cuda": fail, "triton": fail}, winners)
    with pytest.raises(RuntimeError, match="out of memory"):
        broken(torch.ones(2))


def test_nothing_is_measured_where_it_would_do_harm(file, monkeypatch) -> None:
    clock = Clock(cuda=2e-6, triton=1e-6)
    with choosing(clock, file, "rms_norm") as winners:
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        with torch._subclasses.FakeTensorMode():
            norm()
        assert clock.measured == 0
        monkeypatch.setattr(tuning, "may_measure", lambda _: False)  # as while a graph is captured
        norm()
        assert clock.measured == 0 and clock.ran[-1] == "cuda" and not winners.known
        monkeypatch.undo()
        norm()  # and afterwards it is
        assert clock.measured == 2 and clock.ran[-1] == "triton"
        compiled()
        assert clock.measured == 2


def test_capture_of_a_cuda_graph_measures_nothing(monkeypatch) -> None:
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(tuning.torch, "Tensor", OnGpu)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert tuning.may_measure((OnGpu(), 1.0)) != capturing


def test_operation_that_writes_is_measured_on_copies(file) -> None:
    case = testing.cases("adamw_step_")[0]
    inputs, twin = case.inputs(torch.float32), case.inputs(torch.float32)
    clock = Clock(cuda=2e-6, triton=1e-6)
    with choosing(clock, file, "adamw_step_"):
        pyfast.adamw_step_(**inputs)
    pyfast.adamw_step_(**twin)
    assert clock.measured == 2
    assert all(torch.equal(a, b) for a, b in zip(inputs["params"], twin["params"], strict=True))


def test_keys_tell_what_matters() -> None:
    x, w = torch.ones(3, 1000), torch.ones(17, 1000, dtype=torch.bfloat16)
    key = tuning.describe("linear_act", (x, w, None, "gelu", True, 0.5, [x, x, x]))
    words = "linear_act cpu float32[4,1024] bfloat16[32,1024] None gelu True 4 of float32[4,1024]"
    assert key == words
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """`auto` believes in a GPU; what it has measured is in a file of its own."""
    monkeypatch.delenv("PYFAST_REQUIRE", raising=False)
    monkeypatch.delenv("PYFAST_TUNE", raising=False)
    monkeypatch.setattr(backend, "_forced", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "measured", tuning.Winners(tmp_path / "t.json"))
    yield monkeypatch
    monkeypatch.undo()
    backend._select(backend._forced)  # without a GPU nothing chooses
    choosing = "measured" in {told[0] for _, told in backend._rooms.values()}
    assert not choosing or torch.backends.cuda.is_built()


def test_settings_and_determinism_turn_measuring_off(a_gpu) -> None:
    assert backend.measures()
    with pyfast.deterministic(True):
        assert not backend.measures()
    with pyfast.using("triton") if backend.triton_rooms._INSTALLED else pyfast.using("torch"):
        assert not backend.measures()
    a_gpu.setenv("PYFAST_TUNE", "0")
    assert not backend.measures()
    a_gpu.delenv("PYFAST_TUNE")
    a_gpu.setenv("PYFAST_REQUIRE", "cuda")
    assert not backend.measures()


def test_whole_operation_goes_to_torch_where_that_was_quicker(a_gpu) -> None:
    def asks(work: int) -> bool:
        return backend.uses_reference("layer_norm", "cuda", torch.float32, work)

    winners = backend.measured
    a_gpu.setattr(backend, "choose", lambda *_: backend.Choice("cuda", "built"))
    a_gpu.setattr(tuning, "_device_name", lambda _: "a GPU")
    assert not asks(1000)
    assert winners.asked == "layer_norm a GPU torch.float32 work 1024"
    winners.keep(winners.asked, {"pyfast": 2e-6, "torch": 1e-6})
    assert asks(999) and not asks(2000)
    with pyfast.deterministic(True):
        assert not asks(999)


def test_cublaslt_is_asked_for_during_its_calls_only() -> None:
    class Extension:
        here, chosen, seen = True, False, None

        def choose_cublaslt(self, on: bool) -> bool:
            self.chosen = on and self.here
            return self.chosen == on

        def cublaslt_chosen(self) -> bool:
            return self.chosen

    extension = Extension()
    call = choosers.by_cublaslt(extension, lambda x: extension.cublaslt_chosen() and x)
    assert not extension.chosen and call(7) == 7 and not extension.chosen
    extension.here = False
    assert choosers.by_cublaslt(extension, call) is None
    assert choosers.by_cublaslt(object(), call) is None  # an extension that is older


@needs_emulator
def test_kernels_of_the_extension_stand_beside_tritons(file) -> None:
    """Under the CUDA key, as on a GPU; here Triton finds none, and cannot win."""
    winners = tuning.Winners(file, clock=lambda run: run() and 1.0)
    library = choosers.for_gpus("CUDA", backend.OPS, backend._cuda, winners)
    try:
        with emulated() as log, pyfast.using("cuda"):
            out = norm(3, 33)
    finally:
        library._destroy()
    assert torch.allclose(out, norm(3, 33)) and len(log) == 2  # a trial, and the call
    assert list(winners.known.values()) == ["cuda"]


def test_winner_stands_in_the_log(file, caplog) -> None:
    with caplog.at_level(logging.DEBUG, "pyfast"):
        tuning.Winners(file).keep("rope here", {"cuda": 2e-6, "triton": 1e-6})
    assert "rope here: triton wins (cuda 2.0 us, triton 1.0 us)" in caplog.text


def test_tune_measures_each_operation_and_tells(a_gpu, capsys) -> None:
    case = testing.norm("layer_norm", 5, 8)
    winners = backend.measured
    winners.clock = lambda run: run() or 1.0
    a_gpu.setattr(
        backend, "uses_reference", lambda op, *a: bool(setattr(winners, "asked", f"{op} {a[-1]}"))
    )
    assert list(tune.tune(case, torch.float32, "cpu")) == ["pyfast   layer_norm 40"]
    assert list(tune.tune(case, torch.float32, "cpu")) == []
    assert {c.op for c in tune.cases(64, 64, 100)} == set(backend.OPS)


def test_tune_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="tune: there must be a GPU; torch sees none"):
        tune.main(["bfloat16"], [8], [64], 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--xy", "tune: options must be among those of pyfast tune --help; got '--xy'"),
        ("--tokens 8 0", "tune: tokens must be above 0; got 0"),
    ],
)
def test_tune_answers_a_mistake_in_one_sentence(words, message, capsys) -> None:
    assert cli.main(["tune", *words.split()]) == 2
    assert capsys.readouterr().err == f"pyfast: {message}\n"
