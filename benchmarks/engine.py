"""`python -m benchmarks engine`: rollouts from a vLLM server that gold starts, beside Hugging Face generate: tokens per
processor second, and a run whose student is in the server."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import spread
from benchmarks.record import device_name, write_record
from benchmarks.run import KEPT, SECONDS
from gold.build import load, rollout_engine
from gold.build_data import load_data
from gold.config import Config
from gold.data import Prompt
from gold.errors import GoldError
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Generation, Request, RolloutEngine
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.prompts import encode_prompt
from gold.rollout.types import Sampling
from gold.rollout.vllm_process import ColocatedEngine
from gold.run import train
from gold.train.progress import Lines

CONFIG = "configs/smollm2-from-gemma3.yaml"
TOKENS = 48
PHASES = (*SECONDS, "push_s", "engine_idle_s")
WATCHED = (
    *KEPT,
    "staleness",
    "policy_log_ratio_abs",
    "policy_kl",
    "policy_ratio_max",
    "policy_ratio_capped_share",
    *PHASES,
)
ENDS = (".", ",", "\n")
"""Tokens that end a text where lengths are ragged."""


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks engine", description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of vLLM's environment")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 64], help="per draw that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of the run; 0: no run")
    parser.add_argument(
        "--engines", nargs="+", choices=["vllm", "hf"], default=["vllm"], help="that draw a run each, in turn"
    )
    parser.add_argument("--staleness", type=int, choices=[0, 1], default=0, help="of the run's rollouts")
    parser.add_argument("--record", action="store_true", help="keep the numbers in benchmarks/results")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as train.lr=1e-5")
    given = parser.parse_args(list(arguments))
    vllm = {"python": given.python, "context": 512, "arguments": ["--enforce-eager"]}
    overrides = [f"rollout.engine={json.dumps({'vllm': vllm})}", "output=runs/engine"]
    overrides += [f"train.steps={max(1, given.steps)}", f"evaluate.every={max(1, given.steps // 2)}"]
    overrides += [f"rollout.staleness={given.staleness}"]
    try:
        config = Config.load(given.config, [*overrides, *given.overrides])
        if given.prompts:
            kept(
                arguments,
                given.record,
                "engine-throughput",
                lambda: throughput(config, given.prompts, given.rounds),
            )
        if given.steps:
            name = "engine-one-step-off" if given.staleness else "engine"
            runs = {
                "vllm": config,
                "hf": Config.load(given.config, [*overrides, "rollout.engine=hf", *given.overrides]),
            }
            kept(
                arguments,
                given.record,
                name,
                lambda: {"runs": {each: trained(runs[each]) for each in given.engines}},
            )
    except GoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def kept(arguments: Sequence[str], record: bool, name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Measures, prints what came out, and keeps it on request."""
    started = time.perf_counter()
    data = measure()
    shown = {name: run | {"config": "…", "steps": "…"} for name, run in data.get("runs", {}).items()}
    print(json.dumps(data | {"runs": shown} if shown else data, indent=1))
    if record:
        command = f"python -m benchmarks engine {' '.join(arguments)}"
        device = device_name("cpu", torch.get_num_threads()) + ", the server on the same machine"
        print(write_record(name, data, command=command, seconds=time.perf_counter() - started, device=device))


def trained(config: Config) -> dict[str, Any]:
    """A run: evaluations, steps, and mean seconds of its phases."""
    run = train(config, progress=Lines(every_s=0.0), overwrite=True)
    return {
        "config": config.to_dict(),
        "evaluations": run.evaluations,
        "steps": [{name: step[name] for name in WATCHED if name in step} for step in run.steps],
        "mean_seconds": {
            name: sum(step[name] for step in run.steps) / len(run.steps)
            for name in PHASES
            if name in run.steps[0]
        },
    }


def throughput(config: Config, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Tokens per processor second of both engines in turn, for texts of equal and of ragged lengths; processor time is
    this process's and the server's together."""
    model, prompts = load(config.student), load_data(config).train
    here = HuggingFaceEngine(model, max(counts))
    rows: list[dict[str, Any]] = []
    with rollout_engine(config, config.student) as there:
        assert isinstance(there, ColocatedEngine)
        pushes = []
        for _ in range(1 + rounds):
            there.push(model.lm.state_dict(), 0)
            pushes.append(there.push_s)
        for count in counts:
            for lengths in ("equal", "ragged"):
                requests = requests_of(model, prompts, count, lengths)
                engines: Mapping[str, RolloutEngine] = {"vllm": there, "hf": here}
                found = timed(engines, requests, rounds, lambda: processor_seconds(there))
                rows.append({"prompts": count, "lengths": lengths, **found})
                print(json.dumps(rows[-1]), flush=True)
    return {"tokens": TOKENS, "rows": rows, "push_s": pushes[1:]}


def requests_of(model: LanguageModel, prompts: Sequence[Prompt], count: int, lengths: str) -> list[Request]:
    """The requests of one draw."""
    ends = [int(model.vocabulary.encode(text).ids[0]) for text in ENDS]
    stops = tuple(ends) if lengths == "ragged" else ()
    return [
        Request(
            encode_prompt(model, prompts[n % len(prompts)], TOKENS),
            (0, n),
            Sampling(max_new_tokens=TOKENS),
            stops,
        )
        for n in range(count)
    ]


def timed(
    engines: Mapping[str, RolloutEngine], requests: Sequence[Request], rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Median tokens per processor second and seconds of each engine; the first draw of each is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    walls: dict[str, list[float]] = {name: [] for name in engines}
    drawn: dict[str, list[Generation]] = {}
    for number in range(-1, rounds):
        for name in sorted(engines, reverse=bool(number % 2)):
            busy, wall = clock(), time.perf_counter()
            drawn[name] = engines[name].generate(requests)
            if number >= 0:
                tokens = sum(each.ids.size for each in drawn[name])
                rates[name].append(tokens / max(1e-9, clock() - busy))
                walls[name].append(time.perf_counter() - wall)
    return {
        name: {
            "tokens": sum(each.ids.size for each in drawn[name]),
            "tokens_per_cpu_s": spread(rates[name]).median,
            "seconds": spread(walls[name]).median,
        }
        for name in engines
    }


def processor_seconds(engine: ColocatedEngine) -> float:
    """Processor seconds so far of this process and of the server's processes."""
    total = time.process_time()
    assert engine.process is not None
    fields: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
    sessions = {int(each[3]) for each in fields.values() if int(each[1]) == engine.process.pid}
    ticks = sum(int(each[11]) + int(each[12]) for each in fields.values() if int(each[3]) in sessions)
    return total + ticks / 100
