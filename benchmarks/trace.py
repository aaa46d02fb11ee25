"""One default step followed through the code: what `python -m benchmarks step --trace` prints."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator

import gold
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.teachers.several import Teachers
from gold.train.recipe import Recipe
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step

ROOT = Path(gold.__file__).parent
KERNELS = ("kernels/", "bytes/")


@dataclass
class Trace:
    """Functions of gold/ that were entered, by file; how often one file called another; the deepest stack of gold's
    frames that ends in a kernel."""

    functions: dict[str, set[str]] = field(default_factory=dict)
    switches: Counter[tuple[str, str]] = field(default_factory=Counter)
    deepest: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, then the deepest stack, then the files with the number of their functions."""
        total = sum(map(len, self.functions.values()))
        return [
            f"{len(self.functions)} files, {total} functions, {sum(self.switches.values())} calls across files, "
            f"{len(self.deepest)} frames deep",
            "",
            *(f"{depth:>3}  {name}" for depth, name in enumerate(self.deepest, 1)),
            "",
            *(f"{len(names):>3}  {file}" for file, names in sorted(self.functions.items())),
        ]


def traced(function: Callable[[], Any]) -> Trace:
    """What of gold/ a call enters in this thread."""
    trace = Trace()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(str(ROOT)):
            return
        stack = [frame]
        above: FrameType | None = frame.f_back
        while above is not None:
            if above.f_code.co_filename.startswith(str(ROOT)):
                stack.append(above)
            above = above.f_back
        names = [f"{_file(f)}:{f.f_code.co_qualname}" for f in reversed(stack)]
        trace.functions.setdefault(_file(frame), set()).add(frame.f_code.co_qualname)
        if len(stack) > 1 and _file(stack[1]) != _file(frame):
            trace.switches[_file(stack[1]), _file(frame)] += 1
        if _file(frame).startswith(KERNELS) and len(names) > len(trace.deepest):
            trace.deepest = names

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return trace


def _file(frame: FrameType) -> str:
    return str(Path(frame.f_code.co_filename).relative_to(ROOT))


def traced_step() -> Trace:
    """The second step of a default recipe, on tiny models with different tokenizers."""
    task = RunningSums(shortest=2, longest=3)
    prompts = task.prompts("train", 40, 5)
    words = word_tokenizer([f"{p.text}{p.completion}" for p in prompts], 120)
    student = tiny_model(words, "student", layers=1, width=32, seed=1)
    teachers = Teachers({"teacher": tiny_model(character_tokenizer(), "teacher", layers=1, width=32, seed=2)})
    recipe = Recipe(max_new_tokens=10)
    setup = Setup.of(student, teachers, prompts, recipe)
    state = TrainState(student, teachers, recipe, Accelerator(cpu=True, mixed_precision="no"))
    train_step(state, setup)
    return traced(lambda: train_step(state, setup))
