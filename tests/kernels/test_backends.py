"""Which back end runs where, and what is said of one that cannot."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch

from gold import kernels
from gold.errors import ConfigError
from gold.kernels import BACKENDS, backend_for, backends, reference, use_backend, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_device_has_a_back_end() -> None:
    assert backend_for(CPU) is BACKENDS["cpu"]
    assert backend_for(torch.device("meta")) is BACKENDS["reference"]
    with use_backend("reference"):
        assert backend_for(CPU) is BACKENDS["reference"]


@needs_triton
def test_a_cuda_device_has_triton() -> None:
    assert backend_for(CUDA) is BACKENDS["cuda"]


@pytest.mark.usefixtures("no_triton")
def test_without_triton_plain_torch_runs_on_a_cuda_device() -> None:
    assert backend_for(CUDA) is BACKENDS["reference"]
    with use_backend("cuda"), pytest.raises(ConfigError, match=r"'cuda'.* triton"):
        backend_for(CUDA)


@pytest.mark.usefixtures("compiled")
def test_a_back_end_of_another_device_is_refused() -> None:
    with use_backend("cuda"), pytest.raises(ConfigError, match=r"'cuda'.* cpu"):
        backend_for(CPU)
    with use_backend("cpu"), pytest.raises(ConfigError, match=r"'cpu'.* cuda:0.*'reference'"):
        backend_for(CUDA)
    with pytest.raises(ConfigError, match=r"'numba'.* cpu, cuda, reference"), use_backend("numba"):
        pass


def test_the_interpreter_runs_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("cuda", CPU) is None
    assert why_not("cuda", torch.device("meta"))


FUNCTIONS = [name for name in dir(kernels) if callable(getattr(reference, name, None))]


def test_the_entry_functions_are_found() -> None:
    assert {"byte_masses", "segment_logsumexp", "row_divergence"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_triton)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_back_ends_hold_the_same_functions(name: str, function: str) -> None:
    one, other = (inspect.signature(getattr(BACKENDS[b], function)) for b in (name, "reference"))
    assert one == other


def test_an_entry_function_runs_on_the_back_end_of_its_context() -> None:
    value, segment = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with use_backend("reference"):
        assert "WithBackward" not in str(
            kernels.segment_logsumexp(value.requires_grad_(), segment, 1).grad_fn
        )
    assert "WithBackward" in str(kernels.segment_logsumexp(value.requires_grad_(), segment, 1).grad_fn)
