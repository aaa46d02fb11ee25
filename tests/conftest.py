"""What a test needs beyond Python: it is skipped, with the reason, where that is absent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Times on a shared machine say nothing about a case; examples that failed are kept beside the checkout.
settings.register_profile("gold", deadline=None, print_blob=True)
settings.load_profile("gold")

# Before any test imports tokenizers: its threads and those of xdist would warn of each other.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where there is no GPU, its kernels run under Triton's interpreter, which is asked for before triton is loaded.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell that puts its jobs in the background, or nohup, has them ignore signals, and a program that begins so keeps to
# it: the tests' programs begin as from a terminal.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# No test meets a map that another state of the code has kept, or keeps one in the user's folder.
os.environ["GOLD_CACHE"] = ""


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels run on the back end that the test is parametrised with."""
    from gold.kernels import use_backend

    with use_backend(request.param):
        yield request.param


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests without a CUDA device, and `assets` tests without the assets that the mark names (or any)."""
    # A picture at the end of a run takes longer than the run of a tiny model.
    if (run := sys.modules.get("gold.run")) is not None:
        run.plot_run = lambda folder: []  # type: ignore[attr-defined]
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    for mark in item.iter_markers("assets"):
        from benchmarks.assets import assets_folder, listing

        if not mark.args and not assets_folder().is_dir():
            pytest.skip(f"no folder {assets_folder()}: make bench-assets")
        states = {name.split("/")[-1]: state for name, state in listing()}
        missing = [name for name in mark.args if states[name] != "there"]
        if missing:
            pytest.skip(f"not in {assets_folder()}: {', '.join(missing)}: make bench-assets")
