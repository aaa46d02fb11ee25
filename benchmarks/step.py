"""`python -m benchmarks step`: one whole on-policy step by phase, ours and that of TRL's GOLD trainer.

Both train copies of one student against one teacher on the same prompts, with as many new tokens at most, in turn in
one process: a step of TRL's trainer, then one of ours. The phases are `rollout`, what the student writes; `align`, its
text in the teacher's tokens, with both sides' index arrays; `teacher` and `student`, each side's forward pass, with the
student's loss and backward pass; `update`, all else. Of TRL aligning is part of `student`. Memory is the peak of a
step over what is held between steps. The first step of either is not counted.

On a CPU the weights are the real ones where they are published in the assets, else random ones of the published shape;
on a GPU they are random. TRL's loss is its own: the hybrid of GOLD on byte offsets; where it refuses a tokenizer, it
compares position by position. TRL needs an environment of its own (see `python -m benchmarks align --help`); elsewhere
there are only our steps:

    .venv-peers/bin/python -m benchmarks step --record

`--trace` instead follows one default step on tiny models through the code: files and functions of gold/ that it enters,
and how many of its frames lie between the step and a kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from benchmarks import peers
from benchmarks.assets import model_path, tokenizer_path
from benchmarks.clock import Spread, spread
from benchmarks.meter import MIB, Meter, Sample
from benchmarks.record import RESULTS, command_line, device_name, write_record
from benchmarks.trace import traced_step
from gold.data import Prompt, load_prompts
from gold.errors import GoldError
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, wrap_model
from gold.models.pretrained import pick_device
from gold.teachers.several import Teachers
from gold.train.recipe import Recipe, Term
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step

PROMPTS = Path(__file__).resolve().parents[1] / "data" / "openings.jsonl"
PHASES = ("rollout", "align", "teacher", "student", "update")


@dataclass(frozen=True)
class Shape:
    """A published architecture: the type of its configuration, what of it is not the default, its tokenizer's name in
    the assets, and the name of its weights there."""

    kind: str
    settings: Mapping[str, Any]
    tokenizer: str
    weights: str | None = None


def _sizes(
    width: int, inner: int, layers: int, heads: int, groups: int, size: int, **rest: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": size,
        "max_position_embeddings": 8192,
        **rest,
    }


SHAPES = {
    "SmolLM2-135M": Shape(
        "llama",
        _sizes(576, 1536, 30, 9, 3, 49_152, tie_word_embeddings=True),
        "smollm2-135m-instruct",
        "smollm2-135m-instruct",
    ),
    "Gemma-3-270M": Shape(
        "gemma3_text",
        _sizes(640, 2048, 18, 4, 1, 262_144, head_dim=256, query_pre_attn_scalar=256, sliding_window=512),
        "gemma3",
        "gemma3-270m",
    ),
    "Qwen3-0.6B": Shape(
        "qwen3", _sizes(1024, 3072, 28, 16, 8, 151_936, head_dim=128, tie_word_embeddings=True), "qwen3"
    ),
    "Qwen3-1.7B": Shape(
        "qwen3", _sizes(2048, 6144, 28, 16, 8, 151_936, head_dim=128, tie_word_embeddings=True), "qwen3"
    ),
    "Llama-3.1-8B": Shape("llama", _sizes(4096, 14_336, 32, 32, 8, 128_256), "llama3_1"),
}
PAIRS = (
    ("SmolLM2-135M", "Gemma-3-270M"),
    ("SmolLM2-135M", "Qwen3-0.6B"),
    ("Qwen3-1.7B", "Llama-3.1-8B"),
)


@dataclass(frozen=True)
class Step:
    """One step of one trainer: seconds by phase, the peak of memory, tokens that the student wrote."""

    seconds: Mapping[str, float]
    whole_s: float
    peak_bytes: int | None
    tokens: int


@dataclass(frozen=True)
class Trainer:
    """What the counted steps of one trainer took; ``share`` is what of the whole each phase is, at the median."""

    name: str
    steps: int
    seconds: dict[str, Spread]
    share: dict[str, float]
    whole_s: Spread
    tokens: float
    peak_mib: float | None


@dataclass(frozen=True)
class Found:
    """What was found for one pair. ``times_gold``: seconds a token of the other trainer's step over ours of the same
    turn; where samples end by themselves, one trainer's may be shorter."""

    student: str
    teacher: str
    weights: str
    prompts: int
    new_tokens: int
    dtype: str
    trainers: list[Trainer]
    times_gold: Spread | None
    note: str = ""


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbered = ", ".join(f"{n}: {student} ← {teacher}" for n, (student, teacher) in enumerate(PAIRS))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (%(default)s)")
    parser.add_argument(
        "--pairs", type=int, nargs="+", metavar="N", help=f"of {numbered} (0 1; on a GPU 0 2)"
    )
    parser.add_argument("--prompts", type=int, help="prompts a step (4; on a GPU 16)")
    parser.add_argument("--new-tokens", type=int, help="new tokens at most (48; on a GPU 128)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers of random models, fewer than published")
    parser.add_argument("--budget", type=float, help="seconds after which no step is begun")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the result in benchmarks/results/step-cpu.json, or -gpu, with the new tokens that were asked for",
    )
    parser.add_argument("--into", type=Path, default=RESULTS, help="another folder for the record")
    parser.add_argument("--trace", action="store_true", help="follow one default step through the code")
    given = parser.parse_args(list(arguments))
    if given.trace:
        print("\n".join(traced_step().lines()))
        return 0
    started = time.perf_counter()
    try:
        device = pick_device(given.device)
        gpu = device.type == "cuda"
        wanted = given.pairs or ([0, 2] if gpu else [0, 1])
        if any(n not in range(len(PAIRS)) for n in wanted):
            raise GoldError(f"--pairs: choose of {numbered}")
        torch.set_num_threads(given.threads)
        numba.set_num_threads(min(given.threads, numba.get_num_threads()))
        size = Size(
            given.prompts or (16 if gpu else 4),
            given.new_tokens or (128 if gpu else 48),
            given.steps,
            given.layers,
            started + given.budget if given.budget else math.inf,
        )
        where = device_name(device.type, None if gpu else given.threads)
        print(f"{where}\n\n{HEAD}", flush=True)
        found = []
        for n in wanted:
            one = measure(*PAIRS[n], device, size)
            print("\n".join(table_rows(one)), flush=True)
            found.append(one)
            if given.record:
                write_record(
                    "-".join(["step", "gpu" if gpu else "cpu", *map(str, filter(None, [given.new_tokens]))]),
                    {
                        "peers": peers.installed(),
                        "clock": Meter(device).clock,
                        "pairs": [asdict(each) for each in found],
                    },
                    command=command_line("step", arguments),
                    seconds=time.perf_counter() - started,
                    device=where,
                    folder=given.into,
                )
    except GoldError as error:
        parser.exit(1, f"error: {error}\n")
    return 0


@dataclass(frozen=True)
class Size:
    """How much is done in a step, how many steps count, when no step is begun any more."""

    prompts: int
    new_tokens: int
    steps: int
    layers: int | None
    deadline: float


def measure(student: str, teacher: str, device: torch.device, size: Size) -> Found:
    """Steps of both trainers in turn; of ours alone where TRL is not installed."""
    meter = Meter(device)
    mine, theirs = (model_of(name, device, size.layers) for name in (student, teacher))
    # Both trainers train with float32 weights, on a GPU under bf16 autocast; the teacher only reads.
    mine.lm.float()
    theirs.lm.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    prompts = load_prompts(PROMPTS)[: size.prompts]
    ours = GoldSteps(mine, theirs, prompts, size, meter)
    steps: list[tuple[Step, Step | None]] = []
    note = "TRL is not installed"
    if "trl" in peers.installed():
        trl = TrlSteps(copy.deepcopy(mine), theirs, prompts, size, meter)
        note = trl.note

        def turn(step: Step) -> bool:
            steps.append((ours.step(), step))
            return time.perf_counter() < size.deadline

        trl.run(turn)
    else:
        for _ in range(size.steps + 1):
            steps.append((ours.step(), None))
            if time.perf_counter() > size.deadline:
                break
    counted = steps[1:] or steps
    others = [other for _, other in counted if other is not None]
    trainers = [summary("gold", [own for own, _ in counted])]
    if others:
        trainers.append(summary("TRL GOLD", others))
    times = [
        (other.whole_s / max(1, other.tokens)) / (own.whole_s / max(1, own.tokens))
        for own, other in counted
        if other is not None
    ]
    real = [_has_weights(name, device, size.layers) for name in (student, teacher)]
    return Found(
        student,
        teacher,
        "real" if all(real) else "random" if not any(real) else "random teacher",
        len(prompts),
        size.new_tokens,
        "bfloat16 autocast" if device.type == "cuda" else "float32",
        trainers,
        spread(times) if times else None,
        note,
    )


def model_of(name: str, device: torch.device, layers: int | None) -> LanguageModel:
    """Real weights on a CPU where there are some, else random ones of the published shape; ``layers`` for fewer."""
    shape = SHAPES[name]
    if shape.weights is not None and _has_weights(name, device, layers):
        return load_model(model_path(shape.weights), device="cpu")
    config = AutoConfig.for_model(shape.kind, **shape.settings)
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path(shape.tokenizer), trust_remote_code=False)
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        )
    lm.config._name_or_path = str(tokenizer_path(shape.tokenizer))
    return wrap_model(lm.eval(), tokenizer, name=name)


def _has_weights(name: str, device: torch.device, layers: int | None) -> bool:
    return SHAPES[name].weights is not None and device.type == "cpu" and layers is None


class GoldSteps:
    """Our training loop, a step at a time."""

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel,
        prompts: Sequence[Prompt],
        size: Size,
        meter: Meter,
    ) -> None:
        self.meter = meter
        recipe = Recipe(
            objectives=(Term("reverse_kl"),),
            max_new_tokens=size.new_tokens,
            num_generations=1,
            prompts_per_step=len(prompts),
            micro_batch_size=len(prompts),
            steps=size.steps + 1,
        )
        teachers = Teachers({"teacher": teacher})
        cpu = meter.device.type == "cpu"
        accelerator = Accelerator(mixed_precision="no" if cpu else "bf16", cpu=cpu)
        self.setup = Setup.of(student, teachers, prompts, recipe, now=meter.now)
        self.state = TrainState(student, teachers, recipe, accelerator)

    def step(self) -> Step:
        """One step."""
        records = []
        sample = self.meter(lambda: records.append(train_step(self.state, self.setup).metrics))
        (record,) = records
        tokens = round(record["length_tokens"] * len(self.setup.prompts))
        seconds = {phase: record[f"{phase}_s"] for phase in PHASES}
        return _step(seconds, sample, tokens)


class TrlSteps:
    """TRL's GOLD trainer, with what it does told apart by phase."""

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel,
        prompts: Sequence[Prompt],
        size: Size,
        meter: Meter,
    ) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        self.meter, self.size = meter, size
        self.seconds: dict[str, float] = defaultdict(float)
        self.mark = meter.start()
        gold = import_module("trl.experimental.gold")
        dataset = import_module("datasets").Dataset.from_list(
            [{"prompt": prompt.text, "completion": " and"} for prompt in prompts]
        )
        self._folder = tempfile.TemporaryDirectory()
        tokenizer = student.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        cpu = meter.device.type == "cpu"
        settings = {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": len(prompts),
            "max_steps": size.steps + 1,
            "learning_rate": 1e-6,
            "lmbda": 1.0,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_completion_length": size.new_tokens,
            "max_length": 1024,
            "use_uld_loss": True,
            "uld_use_hybrid_loss": True,
            "teacher_tokenizer_name_or_path": str(teacher.tokenizer.name_or_path),
            "gradient_checkpointing": False,
            "bf16": not cpu,
            "use_cpu": cpu,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        extended = _has_offsets(teacher.tokenizer)
        self.note = (
            "" if extended else "TRL has no byte offsets for this teacher and compares position by position"
        )
        with _quiet():
            config = gold.GOLDConfig(**settings, use_extended_uld=extended)
            self.trainer = gold.GOLDTrainer(
                model=student.lm,
                teacher_model=teacher.lm,
                args=config,
                train_dataset=dataset,
                processing_class=tokenizer,
            )
        self.trainer.remove_callback(import_module("transformers").PrinterCallback)
        self._time(self.trainer, "_fill_buffer", "rollout")
        self._time(self.trainer, "compute_loss", "student")
        self._time(self.trainer.accelerator, "backward", "student")

    def run(self, turn: Callable[[Step], bool]) -> None:
        """All steps; ``turn`` gets each, does what it likes, and says whether to go on."""
        callback = import_module("transformers").TrainerCallback
        steps = self

        class Turns(callback):  # type: ignore[misc, valid-type]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                steps.seconds.clear()
                steps.mark = steps.meter.start()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                sample = steps.meter.stop(steps.mark)
                tokens = sum(int((s["labels"] != -100).sum()) for s in steps.trainer._buffered_inputs)
                with torch.enable_grad():
                    if not turn(_step(steps.seconds, sample, tokens)):
                        control.should_training_stop = True

        self.trainer.add_callback(Turns())
        teacher = self.trainer.teacher_model
        forward = teacher.forward
        self._time(teacher, "forward", "teacher", inside="student")
        try:
            with _quiet():
                self.trainer.train()
        finally:
            teacher.forward = forward
            self._folder.cleanup()

    def _time(self, owner: Any, name: str, phase: str, inside: str | None = None) -> None:
        """From now on counts the method's seconds as the phase's; those of another that it is part of get less."""
        method = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = self.meter.now()
            try:
                return method(*arguments, **keywords)
            finally:
                took = self.meter.now() - started
                self.seconds[phase] += took
                if inside:
                    self.seconds[inside] -= took

        setattr(owner, name, timed)


def _step(seconds: Mapping[str, float], sample: Sample, tokens: int) -> Step:
    """A step, what no phase has counted being part of ``update``."""
    told = {phase: seconds.get(phase, 0.0) for phase in PHASES}
    told["update"] += sample.seconds - sum(told.values())
    return Step(told, sample.seconds, sample.peak_bytes, tokens)


def _has_offsets(tokenizer: Any) -> bool:
    """Whether TRL can tell the byte offsets of this tokenizer's tokens."""
    module = import_module("trl.experimental.gold.gold_trainer")
    try:
        module.encode_with_byte_offsets(tokenizer.backend_tokenizer, ["a b"], add_special_tokens=False)
    except NotImplementedError:
        return False
    return True


def summary(name: str, steps: Sequence[Step]) -> Trainer:
    """Spreads over the steps."""
    whole = spread([step.whole_s for step in steps])
    seconds = {phase: spread([step.seconds[phase] for step in steps]) for phase in PHASES}
    peaks = [step.peak_bytes for step in steps if step.peak_bytes is not None]
    return Trainer(
        name,
        len(steps),
        seconds,
        {phase: value.median / whole.median for phase, value in seconds.items()},
        whole,
        sum(step.tokens for step in steps) / len(steps),
        round(max(peaks) / MIB, 1) if peaks else None,
    )


HEAD = (
    f"| student ← teacher | prompts × tokens | trainer | tokens | {' | '.join(f'{p} s' for p in PHASES)} | step s "
    "| × gold | peak MiB | |\n" + "|---" * (len(PHASES) + 8) + "|"
)


def table_rows(found: Found) -> list[str]:
    """Lines of the table under `HEAD`, one a trainer; in brackets the phase's share of the step."""
    lines = []
    for trainer in found.trainers:
        phases = [f"{trainer.seconds[p].median:.2f} ({trainer.share[p]:.0%})" for p in PHASES]
        whole = f"{trainer.whole_s.median:.2f} ({trainer.whole_s.low:.2f}–{trainer.whole_s.high:.2f})"
        other = trainer.name != "gold"
        times = f"{found.times_gold.median:.2f}" if other and found.times_gold else ""
        peak = "–" if trainer.peak_mib is None else f"{trainer.peak_mib:,.0f}"
        cells = [
            f"{found.student} ← {found.teacher}, {found.weights} weights",
            f"{found.prompts} × {found.new_tokens}",
            trainer.name,
            f"{trainer.tokens:.0f}",
            *phases,
            whole,
            times,
            peak,
            found.note if other or len(found.trainers) == 1 else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, bars and notes of others."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    bars = import_module("datasets").utils.logging
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(before)
