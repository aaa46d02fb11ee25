"""Seconds and peak memory of one call at a time, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """One call: seconds, and the most memory held during it over what was held before it; None where nobody tells."""

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Mark:
    """Where a measurement began: the clock, and the memory held."""

    at_s: float
    held_bytes: int | None


class Meter:
    """Measures calls on one device.

    On a GPU it waits for all work, and memory is what torch has allocated. On a CPU memory is what the process has in
    use, as Linux counts it; with one thread seconds are those that a processor was busy, so that other programs do not
    count, else those of the clock on the wall (``clock`` says which).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock = "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"

    def __call__(self, work: Callable[[], object]) -> Sample:
        """What a call of ``work`` takes; Python's garbage collector waits meanwhile."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            mark = self.start()
            work()
            return self.stop(mark)
        finally:
            if collecting:
                gc.enable()

    def start(self) -> Mark:
        """Where a measurement begins; there is one at a time."""
        held = self._held()
        return Mark(self.now(), held)

    def stop(self, mark: Mark) -> Sample:
        """What there was since ``mark``."""
        seconds = self.now() - mark.at_s
        if mark.held_bytes is None:
            return Sample(seconds, None)
        gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else _status("VmHWM")
        return Sample(seconds, peak - mark.held_bytes)

    def now(self) -> float:
        """Seconds on the clock, once all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock == "processor" else time.perf_counter()

    def free_bytes(self) -> int | None:
        """Memory that is still to be had."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        found = None
        with suppress(OSError):
            found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _held(self) -> int | None:
        """Memory in use; the high-water mark falls to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        with suppress(OSError, AttributeError):
            # What was freed is handed back first, or a call could use it unseen.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            return _status("VmRSS")
        return None


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{STATUS}: no {name}")
    return int(found[1]) * 1024
