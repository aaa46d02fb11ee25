"""The Triton kernels as the compiler takes them, for a GPU that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Hopper:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Hopper())
run = JITFunction.run

def only_compile(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"]
    print(self.__name__)

JITFunction.run = only_compile

from gold.kernels import triton as cuda
from gold.kernels.reference import MixedKL
from support.kernel_inputs import FORMS, every_function, kept_events

def both_ways(*results):
    sum(r.sum() for r in results if r.requires_grad).backward()

for dtype in (torch.float32, torch.bfloat16):
    logits = torch.zeros(3, 64, dtype=dtype, requires_grad=True)
    for function in every_function(64).values():
        out = function(cuda, logits)
        both_ways(*(out if isinstance(out, tuple) else (out,)))
    for form in FORMS:
        both_ways(*cuda.row_divergence(logits, logits, *kept_events(64, 64), form, unshared="renormalise"))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "gold/kernels/triton").glob("*.py")]
    launched = set(re.findall(r"\brun\(\s*(?:\w+\.)?(\w+),", "\n".join(sources)))
    assert set(done.stdout.split()) == launched
