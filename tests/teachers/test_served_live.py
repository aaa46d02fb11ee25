"""Branches of a teacher on a real vLLM server (`make vllm`), beside those of the same model in this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
from support.command import run_gold
from support.live_vllm import LIVE, PYTHON

from gold import LocalTeacher, Prompt
from gold.bytes.trie import ByteTrie
from gold.exact.marginals import Marginals, marginals
from gold.kernels.layout import KernelTrie
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.teachers import ServedTeacher, Teacher

pytestmark = LIVE
NAME, STARTS_IN_S = "words", 600.0
BLOCK = 32
"""Tokens of a block of vLLM's prefix cache."""
PROMPT = Prompt("one", text=" 12" + " +7" * 40 + " =")
TEXTS = " 19 49", " 19 4 9", " 123 -5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are whole numbers, which can also be written digit by digit."""
    path = tmp_path_factory.mktemp("words")
    save_model(tiny.tiny_student(width=128), path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM as the page of served teachers starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    words = ["--model", str(folder), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len", "128", "--dtype", "float32", "--enforce-eager", "--max-logprobs", "200"]
    words += ["--block-size", str(BLOCK)]
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/version", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def cached(url: str) -> float:
    """Tokens that the server has found in its prefix cache so far."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:prefix_cache_hits_total"))


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_IN_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(f"vLLM does not answer; its log is {log}")


@pytest.fixture(scope="module")
def local(folder: Path) -> LanguageModel:
    return load_model(folder)


def found(teacher: Teacher, text: str, least: float = 1e-3) -> Marginals:
    tokenized = teacher.vocabulary.encode(text)
    trie = KernelTrie(ByteTrie.of(teacher.vocabulary))
    return marginals(
        teacher.vocabulary, trie, tokenized, True, teacher.states(PROMPT, tokenized, True), least
    )


def test_branches_behind_a_cached_prefix_are_those_of_the_model_itself(
    folder: Path, url: str, local: LanguageModel
) -> None:
    there = ServedTeacher(folder, url=url, model=NAME, top_k=local.vocabulary.size)
    here = LocalTeacher(local)
    for text in TEXTS:
        before = cached(url)
        mine, told = found(here, text), found(there, text)
        assert told.branches == mine.branches > 3
        assert cached(url) >= before + told.branches * BLOCK
        for name in ("named", "open"):
            np.testing.assert_allclose(np.exp(getattr(told, name)), np.exp(getattr(mine, name)), atol=1e-5)
    assert there.retries == 0
    assert there._follows  # what is next behind a branch was told by a request of one new token


def test_what_the_server_does_not_tell_is_unresolved(folder: Path, url: str, local: LanguageModel) -> None:
    told, whole = (
        found(each, TEXTS[0], 0.01)
        for each in (ServedTeacher(folder, url=url, model=NAME, top_k=5), LocalTeacher(local))
    )
    assert (np.exp(told.named) <= np.exp(whole.named) + 1e-5).all()
    assert np.exp(told.strict_rest).sum() > np.exp(whole.strict_rest).sum()


def test_an_evaluation_of_the_command_line_has_the_exact_divergence(
    folder: Path,
    url: str,
    local: LanguageModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(tiny.tiny_teacher(), tmp_path / "student")
    served = {"url": url, "model": NAME, "api": "vllm", "top_k": local.vocabulary.size}

    def measured(teacher: dict[str, Any]) -> dict[str, Any]:
        settings = tiny.run_settings(
            tmp_path, tmp_path / "run", teacher=teacher, evaluate__prompts=3, evaluate__branches=0.01
        )
        file = tiny.write_settings(tmp_path / "run.yaml", settings)
        ended = run_gold(monkeypatch, capfd, "eval", file, "--json")
        assert ended.code == 0, ended.err
        measures: dict[str, Any] = json.loads(ended.out)
        return measures.get("measures", measures)  # type: ignore[no-any-return]

    there = measured({"path": str(folder), "served": served, "device": "cpu"})
    here = measured({"path": str(folder), "device": "cpu"})
    names = [name for name in here if name.startswith(("exact_reverse", "least_reverse"))]
    names += ["reverse_kl_per_byte", "teacher_unresolved_mass", "teacher_branches_per_token"]
    assert len(names) >= 5
    for name in names:
        assert there[name] == pytest.approx(here[name], rel=2e-3, abs=2e-5), name
    assert 0 < there["least_reverse_kl_per_byte"] < there["exact_reverse_kl_per_byte"]
    assert not any("forward" in name for name in there)  # the server is not asked to generate
