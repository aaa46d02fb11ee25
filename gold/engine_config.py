"""The configuration of rollout engines: `rollout.engine`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gold.errors import ConfigError
from gold.schema import CountInt, PositiveFloat, PositiveInt, Section, Text, shown
from gold.train.recipe import Rollout


def _is_url(url: str) -> str:
    from gold.http import check_url  # imported here: only servers need it

    try:
        check_url(url)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("url: ")) from None
    return url


def _is_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("expected the name of an environment variable, never a key itself")
    return name


ServerURL = Annotated[Text, AfterValidator(_is_url)]
"""The URL of a server, without a key in it."""
KeyVariable = Annotated[Text, AfterValidator(_is_name)]
"""The name of an environment variable that holds a key."""


class VLLMConfig(Section):
    """A vLLM server that draws the student's completions: a running one, or `vllm: colocated`, one that gold starts on
    this machine and ends with the run. See docs/engines.md."""

    url: ServerURL | None = None
    """URL of a running server, such as http://localhost:8000; null: gold starts one"""
    model: Text = "student"
    """the student's name on the server"""
    transfer: Literal["file", "nccl", "ipc"] = "file"
    """how weights get there: a file that both sides can open; nccl: between GPUs; ipc: on one GPU"""
    folder: Text | None = None
    """folder for that file; null: shared memory"""
    concurrency: PositiveInt = 256
    """maximum of concurrent requests"""
    timeout_s: PositiveFloat = 600.0
    """time limit of a request, the wait in the server's queue included"""
    retries: CountInt = 3
    """how often a failed request, and a failed push of weights, is repeated"""
    key_env: KeyVariable | None = None
    """name of the environment variable that holds the server's key"""
    adapters: bool = False
    """push the adapter of a student with student.lora alone; the server has the weights of student.path"""
    sleep: Literal[0, 1, 2] | None = None
    """between draws, 1: move its weights to the CPU, 2: drop them; null: 1 where gold starts it on a GPU, else 0"""
    python: Text | None = None
    """interpreter of the environment with vLLM, where gold starts the server; null: gold's own"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the server that gold starts; null: the student's"""
    context: PositiveInt | None = None
    """longest sequence, in tokens, of the server that gold starts; null: the student's"""
    arguments: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """further arguments of the server that gold starts, such as [--gpu-memory-utilization, "0.4"]"""

    @model_validator(mode="before")
    @classmethod
    def _colocated(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given != "colocated":
                raise ValueError(f"expected colocated, or keys such as url, got {shown(given)}")
            return {}
        return given

    @model_validator(mode="after")
    def _fits(self) -> VLLMConfig:
        if self.url is not None:
            for name in ("python", "dtype", "context", "arguments"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of a server that gold starts: leave it or url out")
        elif self.transfer == "nccl":
            raise ValueError(
                "transfer nccl is for a server with GPUs of its own: give its url, or choose ipc"
            )
        if self.folder is not None and self.transfer != "file":
            raise ValueError(f"folder is of transfer file, got {self.transfer}: leave one of them out")
        return self


class EngineConfig(Section):
    """What draws the student's completions: `hf`, transformers in this process, or `{vllm: {url: …}}`, or `{vllm:
    colocated}`."""

    vllm: VLLMConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given != "hf":
                raise ValueError(f"expected hf or {{vllm: …}}, got {shown(given)}")
            return {}
        return given


class RolloutConfig(Rollout):
    """How the student generates."""

    engine: EngineConfig = EngineConfig()
    completions: Text | None = None
    """folder for the initial student's completions, which other runs can share; null: one in the run folder"""
