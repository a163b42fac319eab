"""Doctor: one row per operation, the reasons, and an exit code that tells health."""

import importlib.util
import json

import pytest

from pyfast import backend, build, doctor


@pytest.fixture
def fresh(monkeypatch):
    """An installation whose extension was built from these sources, and no settings."""
    for name in ("PYFAST_BACKEND", "PYFAST_REQUIRE"):
        monkeypatch.delenv(name, raising=False)
    if backend.extension() is None:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(build, "source_hash", lambda archs: backend.extension().source_hash)


BUILT = bool(backend._cuda)  # with CUDA kernels


def test_doctor_names_every_operation_on_every_device(capsys):
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    for op in backend.OPS:
        row = next(line.split() for line in lines if line.split()[:1] == [op])
        assert len(row) == 3 and row[1] in {"cpp", "torch"}
        assert row[2] in {"cuda", "triton", "torch"}
    reason = "triton 3" if importlib.util.find_spec("triton") else "triton is not installed"
    reason = "compiled for" if BUILT else reason
    assert any(line.startswith("  cuda, ") and reason in line for line in lines)


def test_doctor_json_holds_the_facts(capsys):
    code = doctor.main(as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] and facts["cpu"]["threads"] >= 1
    assert len(facts["operations"]) == 2 * len(backend.OPS)
    assert code == (1 if facts["problems"] else 0)


def test_doctor_names_the_instruction_sets(fresh):
    facts = doctor.examine()["extension"]
    assert set(facts["isas_usable"]) <= set(facts["isas_compiled"])
    assert facts["isa"] in facts["isas_usable"]


def test_doctor_finds_a_stale_extension(monkeypatch, fresh, capsys):
    monkeypatch.setattr(build, "source_hash", lambda archs: "other")
    assert doctor.main() == 1
    assert "Problem: the extension is stale: rebuild with" in capsys.readouterr().out


CUDA = "cuda, cuda: compiled for" if BUILT else "cuda, none: PYFAST_REQUIRE must find a kernel"


@pytest.mark.parametrize(
    ("setting", "healthy", "words"),
    [
        ("PYFAST_BACKEND=torch", True, 'cpu, torch: asked for: backend "torch"'),
        ("PYFAST_BACKEND=fortran", False, "of auto, cpp, cuda, triton, torch; got 'fortran'"),
        ("PYFAST_BACKEND=triton", False, "cpu, none: triton"),
        ("PYFAST_REQUIRE=cuda", True, CUDA),
    ],
)
def test_doctor_tells_what_a_setting_does(setting, healthy, words, monkeypatch, fresh, capsys):
    name, value = setting.split("=")
    monkeypatch.setenv(name, value)
    if name == "PYFAST_BACKEND":
        monkeypatch.setattr(backend, "_forced", value)  # read from the environment at import
    code = doctor.main()
    text = capsys.readouterr().out
    assert setting in text
    assert text.split("Problem")[0].count(words) == (2 if "fortran" in setting else 1)
    assert code == (0 if healthy else 1)


def test_doctor_finds_kernels_that_a_gpu_could_not_use():
    facts = {"extension": {}, "environment": {}, "gpu": {"devices": ["H100"]}}
    row = {"device": "cuda", "backend": "torch", "why": "triton is not installed"}
    problems = doctor._problems(facts | {"operations": [row]})
    assert problems == ["CUDA tensors do not take the Triton kernels: triton is not installed"]


def test_doctor_finds_a_missing_extension(monkeypatch, fresh, capsys):
    monkeypatch.setattr(backend, "_extension", None)
    monkeypatch.setattr(backend, "_extension_why", "pyfast._C is not built (no compiler)")
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "the extension is not built" in text
    assert text.count("Problem") == 1
    assert "Problem: CPU tensors do not take the C++ kernels: pyfast._C is not built (no" in text
