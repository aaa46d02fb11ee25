"""`python -m benchmarks claims [PART …]`: what on-policy distillation promises, measured; one part per claim.

A part is a module with ``measure(given) -> data``, ``table(data) -> Markdown`` and ``draw(data, path)``; its record is
`claims-PART.json`, with a picture beside it. Its runs are cells (`benchmarks.claims.cells`): each is kept as soon as
it is done, and not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.claims.cells import Cells, Given
from benchmarks.record import RESULTS, command_line, device_name, write_record

PARTS = {
    "prompts": "accuracy over the number of prompts: distillation, imitation, a reward",
    "efficiency": "what each way costs for the same accuracy, on a procedural task",
    "factors": "what a teacher says after mistakes, and whether distillation or imitation is ahead",
    "recovery": "a lost skill comes back from the old self, and new knowledge stays",
    "instructions": "the same with real weights: instructions of IFEval, and documents",
    "facts": "which divergence moves skills, and which facts",
    "pairs": "ways to compare two tokenizers, on tiny pairs and a real one",
    "branches": "training on exact next-byte tables, beside the bucket",
    "selection": "a share of the bytes, or of the teacher's tokens, instead of all",
    "countdown": "how much of its teacher a student recovers where right texts differ",
    "coverage": "how much of a text two tokenizers cut alike",
}
"""The parts, and what each shows; a part is the module of its name in this package."""


def _device(workers: int) -> str:
    """Where the models of all parts are: on the GPU if there is one."""
    if torch.cuda.is_available():
        return f"{device_name('cuda')}, {workers} processes"
    return device_name("cpu", 1) + f" a process, {workers} processes"


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="; ".join(f"{name}: {does}" for name, does in PARTS.items())
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each row")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny sizes in this process, to see that a part works; writes no record",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/claims"), help="where finished cells are kept"
    )
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the records")
    given = parser.parse_args(list(arguments))
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part {unknown[0]!r}; known are {', '.join(PARTS)}")
    for part in given.parts or PARTS:
        module = import_module(f"benchmarks.claims.{part}")
        started = time.perf_counter()
        folder = given.folder / (f"{part}-small" if given.small else part)
        cells = Cells(folder, 0 if given.small else given.workers)
        data = module.measure(Given(cells, given.seeds, given.small))
        print(f"\n{part}: {PARTS[part]}\n\n{module.table(data)}\n", flush=True)
        if not given.small:
            name = f"claims-{part}"
            path = write_record(
                name,
                {**cells.spent(), **data},
                command=command_line("claims", [part, f"--seeds={given.seeds}"]),
                seconds=time.perf_counter() - started,
                device=_device(given.workers),
                folder=given.into,
            )
            module.draw(data, given.into / f"{name}.png")
            print(path, flush=True)
    return 0
