"""`python -m benchmarks served --url URL --model NAME`: a run that learns from a live server, and how much of the time
that it waits for the server is the client's own."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import httpx2
import torch

from benchmarks.clock import spread
from benchmarks.record import device_name, write_record
from benchmarks.run import KEPT, SECONDS
from gold.build import evaluation_of
from gold.build_data import load_data
from gold.config import Config
from gold.data import Prompt
from gold.doctor.server import examine_noise, examine_server
from gold.errors import GoldError
from gold.evaluate import evaluate
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.run import train
from gold.teachers.local import LocalTeacher
from gold.teachers.served import ServedTeacher
from gold.tokenize.chat import prompt_text
from gold.train.progress import Lines

CONFIG = "configs/smollm2-from-gemma3.yaml"


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks served", description=__doc__)
    parser.add_argument("--url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument(
        "--model", required=True, help="what the server calls the teacher of the configuration"
    )
    parser.add_argument("--api", default="vllm", help="vllm, sglang or openai")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--rounds", type=int, default=5, help="of the scoring that is timed")
    parser.add_argument(
        "--local", action="store_true", help="judge the student by the same weights in this process too"
    )
    parser.add_argument("--record", action="store_true", help="keep the numbers in benchmarks/results")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as train.steps=8")
    given = parser.parse_args(list(arguments))
    there = {"url": given.url, "model": given.model, "api": given.api, "top_k": given.top_k}
    overrides = [f"teacher.served={json.dumps(there)}", "output=runs/served", *given.overrides]
    try:
        config = Config.load(given.config, overrides)
        started = time.perf_counter()
        data = measure(config, given.rounds, given.local)
        seconds = time.perf_counter() - started
    except GoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({name: data[name] for name in ("scoring", "evaluations")}, indent=1))
    if given.record:
        command = f"python -m benchmarks served {' '.join(arguments)}"
        device = device_name("cpu", torch.get_num_threads()) + ", the server on the same machine"
        print(write_record("served", data, command=command, seconds=seconds, device=device))
    return 0


def measure(config: Config, rounds: int, local: bool) -> dict[str, Any]:
    """What the server is, how quick it scores, the run, whose held-out evaluations ask the server, and with ``local``
    its student before and after as the same weights in this process judge it."""
    assert config.teacher is not None
    assert config.teacher.served is not None
    assert config.teacher.path is not None
    teacher = ServedTeacher(config.teacher.path, **config.teacher.served.model_dump())
    prompts = load_data(config)
    checks = [*examine_server(teacher, prompts.train), examine_noise(teacher, prompts.train)]
    scoring = time_scoring(teacher, prompts.heldout, rounds)
    run = train(config, progress=Lines(every_s=0.0))
    before_and_after = (config.student.path, f"{config.output}/student") if local else ()
    where = config.teacher.path, config.teacher.device, config, prompts.heldout
    judged = [
        _judged(*where, load_model(path, dtype=config.student.dtype, device=config.student.device))
        for path in before_and_after
    ]
    kept = (*KEPT, "teacher_tokens_per_s", "teacher_retries")
    return {
        "server": _version(teacher),
        "checks": [asdict(check) for check in checks],
        "scoring": scoring,
        "config": config.to_dict(),
        "evaluations": run.evaluations,
        "judged_locally": judged,
        "steps": [{name: step[name] for name in kept if name in step} for step in run.steps],
        "mean_seconds": {name: sum(step[name] for step in run.steps) / len(run.steps) for name in SECONDS},
    }


def time_scoring(teacher: ServedTeacher, prompts: Sequence[Prompt], rounds: int) -> dict[str, Any]:
    """Seconds in which the same texts are scored, by the client and by a bare loop that sends the same requests, as
    many at a time, and reads the answers without looking at them; in turn, each with the processor time of this
    process, and the client's share of the time that scoring takes."""
    texts = [teacher.vocabulary.encode(prompt_text(prompt) * 4) for prompt in prompts]
    ended = [True] * len(texts)
    asked = [teacher.request(p, t.ids.tolist(), True) for p, t in zip(prompts, texts, strict=True)]
    bodies = [
        json.dumps(teacher.dialect.call(teacher.served_model, each).body).encode()
        for each in sorted(asked, key=lambda each: -len(each.ids))
    ]
    path = teacher.dialect.call(teacher.served_model, asked[0]).path
    before = teacher.retries
    seconds: dict[str, list[float]] = {"client": [], "bare": []}
    busy: dict[str, list[float]] = {"client": [], "bare": []}
    works: dict[str, Callable[[], object]] = {
        "client": lambda: teacher.score(prompts, texts, ended),
        "bare": lambda: asyncio.run(_bare(teacher, path, bodies)),
    }
    for number in range(-1, rounds):  # the first is not counted
        for name in sorted(works, reverse=bool(number % 2)):
            wall, used = time.perf_counter(), time.process_time()
            works[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - wall)
                busy[name].append(time.process_time() - used)
    tokens = sum(len(each.ids) - each.start for each in asked)
    client, bare = (spread(seconds[name]).median for name in ("client", "bare"))
    return {
        "texts": len(texts),
        "tokens": tokens,
        "tokens_with_prompts": sum(len(each.ids) for each in asked),
        "tokens_per_s": tokens / client,
        "tokens_per_s_bare": tokens / bare,
        "seconds": {name: asdict(spread(values)) for name, values in seconds.items()},
        "process_seconds": {name: asdict(spread(values)) for name, values in busy.items()},
        "client_share_by_ratio": 1 - bare / client,
        "client_share_by_process_time": spread(busy["client"]).median / client,
        "retries": teacher.retries - before,
    }


async def _bare(teacher: ServedTeacher, path: str, bodies: Sequence[bytes]) -> None:
    slots = asyncio.Semaphore(teacher.server.concurrency)
    async with httpx2.AsyncClient(timeout=None, headers={"content-type": "application/json"}) as client:

        async def post(body: bytes) -> None:
            async with slots:
                (await client.post(teacher.server.root + path, content=body)).raise_for_status()

        await asyncio.gather(*map(post, bodies))


def _judged(
    path: str, device: str, config: Config, prompts: Sequence[Prompt], student: LanguageModel
) -> dict[str, float]:
    teacher = LocalTeacher(load_model(path, dtype="float32", device=device))
    return evaluate(student, teacher, prompts, plan=evaluation_of(config)).measures


def _version(teacher: ServedTeacher) -> str:
    """What the server says it is, where it does."""
    try:
        answer = httpx2.get(f"{teacher.server.root}/version", timeout=10).json()
    except (httpx2.HTTPError, ValueError):
        return teacher.api
    return f"{teacher.api} {answer.get('version', '')}".strip()
