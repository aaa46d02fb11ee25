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
            before = self._start()
            now = time.process_time if self.clock == "processor" else time.perf_counter
            started = now()
            work()
            self._wait()
            return Sample(now() - started, self._peak(before))
        finally:
            if collecting:
                gc.enable()

    def free_bytes(self) -> int | None:
        """Memory that is still to be had."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        found = None
        with suppress(OSError):
            found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        with suppress(OSError, AttributeError):
            # What was freed is handed back first, or a call could use it unseen.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use
            return _status("VmRSS")
        return None

    def _peak(self, before: int | None) -> int | None:
        if before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - before
        return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{STATUS}: no {name}")
    return int(found[1]) * 1024
