"""A real vLLM server on this machine (`make vllm`), for the slow tests that start one."""

from __future__ import annotations

from pathlib import Path

import pytest

import gold

PYTHON = Path(gold.__file__).parent.parent / ".venv-vllm" / "bin" / "python"
"""The interpreter of vLLM's environment."""
LIVE = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: make vllm")]
"""The marks of a test module that needs it."""
