"""What every test starts from: the same random numbers, no network, no display."""

import os
import random

import hypothesis
import numpy
import pytest
import torch

from tests.emulator import cuda_extension

cuda_extension.install()  # before pyfast looks for its extension

from pyfast import backend  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# The same examples in every run: a red test is about the change, not about the day.
hypothesis.settings.register_profile("pyfast", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("pyfast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--packaging",
        action="store_true",
        help="also install in fresh virtual environments (minutes)",
    )
    parser.addoption(
        "--device",
        choices=["cuda", "emulator"],
        help="where tests/test_device.py runs; default: on a GPU if there is one",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--packaging"):
        return
    skip = pytest.mark.skip(reason="needs minutes; run `make packaging`")
    for item in items:
        if item.get_closest_marker("packaging"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Each test draws the same numbers, alone or among others."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_for_little_work(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests are about the kernels, also at sizes where `auto` leaves the work to torch."""
    if request.node.get_closest_marker("little_work"):
        monkeypatch.delenv("PYFAST_REQUIRE", raising=False)
    else:
        monkeypatch.setattr(backend, "LITTLE_WORK", {})
    backend._choices.clear()
