"""Which back end runs where, and what is said of one that cannot."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from gold import kernels
from gold.errors import ConfigError
from gold.kernels import BACKENDS, backend_for, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_device_has_a_back_end() -> None:
    assert backend_for(CPU) is BACKENDS["cpu"]
    assert backend_for(torch.device("meta")) is BACKENDS["reference"]
    assert backend_for(CPU, "reference") is BACKENDS["reference"]


@needs_triton
def test_a_cuda_device_has_triton() -> None:
    assert backend_for(CUDA) is BACKENDS["cuda"]


@pytest.mark.usefixtures("no_triton")
def test_without_triton_plain_torch_runs_on_a_cuda_device() -> None:
    assert backend_for(CUDA) is BACKENDS["reference"]
    with pytest.raises(
        ConfigError, match="'cuda' cannot run on cuda:0: it needs triton, which is not installed"
    ):
        backend_for(CUDA, "cuda")


@pytest.mark.usefixtures("compiled")
def test_a_back_end_of_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cuda' cannot run on cpu: it is for CUDA devices"):
        backend_for(CPU, "cuda")
    with pytest.raises(ConfigError, match="'cpu' cannot run on cuda:0: it is for CPUs; choose 'reference'"):
        backend_for(CUDA, "cpu")
    with pytest.raises(
        ConfigError, match="unknown kernel back end 'numba': choose one of cpu, cuda, reference"
    ):
        backend_for(CPU, "numba")


def test_the_interpreter_runs_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("cuda", CPU) is None
    assert why_not("cuda", torch.device("meta"))


CALLED = sorted(
    {
        name
        for file in Path(kernels.__file__).parents[1].rglob("*.py")
        for name in re.findall(r"\bbackend\.(\w+)\(", file.read_text(encoding="utf-8"))
        if hasattr(BACKENDS["reference"], name)
    }
)


def test_the_functions_that_are_called_are_found() -> None:
    assert {"byte_masses", "segment_logsumexp", "row_divergence"} <= set(CALLED)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_triton)])
@pytest.mark.parametrize("function", CALLED)
def test_back_ends_hold_the_same_functions(name: str, function: str) -> None:
    one, other = (inspect.signature(getattr(BACKENDS[b], function)) for b in (name, "reference"))
    assert one == other
