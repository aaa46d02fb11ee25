"""`gold init`: a folder with a commented configuration, prompts to begin with, and the next commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gold.config import Config
from gold.errors import ConfigError, did_you_mean
from gold.files import replace_text
from gold.schema import keys_of

_HERE = Path(__file__).parent / "starters"
CONFIG, PROMPTS, HELDOUT, README = "run.yaml", "prompts.jsonl", "heldout.jsonl", "README.md"
_WIDTH = 44
"""The column at which comments begin."""
_NOT_THINKING = "{enable_thinking: false}"


@dataclass(frozen=True)
class Starter:
    """A kind of run to begin with: its models, and the keys that it sets, as YAML; all others have their defaults.

    ``student_keys`` and ``teacher_keys`` are those of the models that it names itself.
    """

    summary: str
    student: str
    teacher: str
    settings: Mapping[str, str]
    student_keys: Mapping[str, str] = field(default_factory=dict)
    teacher_keys: Mapping[str, str] = field(default_factory=dict)
    hints: Sequence[str] = ()


STARTERS = {
    "demo": Starter(
        "a small model continues texts as another one does; a CPU is enough",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Qwen/Qwen2.5-0.5B",
        {
            "rollout.max_new_tokens": "48",
            "rollout.num_generations": "1",
            "optimizer.lr": "3e-5",
            "train.steps": "30",
            "train.prompts_per_step": "4",
            "train.checkpoint_every": "15",
            "evaluate.every": "15",
        },
    ),
    "chat": Starter(
        "an assistant learns to answer as a larger one does, each through its own chat template; one GPU",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "Qwen/Qwen3-1.7B",
        {"rollout.max_new_tokens": "256", "train.steps": "300"},
        teacher_keys={"template_kwargs": _NOT_THINKING},
    ),
    "reasoning": Starter(
        "long answers that reach a result; one GPU",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "Qwen/Qwen3-4B",
        {
            "rollout.max_new_tokens": "1024",
            "train.steps": "300",
            "train.gradient_checkpointing": "true",
        },
        student_keys={"dtype": "bfloat16"},
        teacher_keys={"template_kwargs": _NOT_THINKING},
        hints=(
            "With a task in place of files, answers are checked too: held-out accuracy, and the objective `reward`",
            "(pip install 'gold-distill[tasks]'). Then data has only this key:",
            "  task: {name: countdown, train: 2000, heldout: 64}",
        ),
    ),
    "lora": Starter(
        "adapters on a model of 4 billion weights, with a teacher of 15 billion; one GPU of 80 GB",
        "Qwen/Qwen3-4B",
        "microsoft/phi-4",
        {
            "student.lora.rank": "64",
            "student.lora.alpha": "128",
            "rollout.max_new_tokens": "512",
            "optimizer.lr": "1e-4",
            "train.steps": "300",
            "train.gradient_checkpointing": "true",
        },
        student_keys={"dtype": "bfloat16", "template_kwargs": _NOT_THINKING},
    ),
}

# The keys that are shown, in this order; those that a starter does not set are comments with their defaults.
_SHOWN = (
    *("student.path", "student.dtype", "student.quantization", "student.template_kwargs"),
    *("student.lora.rank", "student.lora.alpha"),
    *("teacher.path", "teacher.dtype", "teacher.quantization", "teacher.template_kwargs"),
    *("data.prompts", "data.heldout"),
    *("rollout.max_new_tokens", "rollout.num_generations", "rollout.temperature"),
    "objectives",
    *("optimizer.lr", "optimizer.warmup_steps", "optimizer.schedule"),
    *("train.steps", "train.prompts_per_step", "train.micro_batch_size", "train.gradient_checkpointing"),
    *("train.checkpoint_every", "train.seed", "train.trackers"),
    *("evaluate.every", "evaluate.prompts"),
    "output",
)


def make_starter(
    kind: str,
    folder: Path,
    student: str | None = None,
    teacher: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Makes the folder of a starter; returns the commands that come next.

    ``student`` and ``teacher`` replace the starter's own models.

    Raises:
        ConfigError: there is no such starter, one of its files is in the folder already, or it cannot be written.
    """
    if kind not in STARTERS:
        known = ", ".join(STARTERS)
        raise ConfigError(
            f"there is no starter {kind!r}: choose one of {known}{did_you_mean(kind, STARTERS, '')}"
        )
    starter = STARTERS[kind]
    names = [_path(given) for given in (student, teacher)]
    files = {
        CONFIG: config_text(kind, *names),
        **{name: (_HERE / f"{kind}.{name}").read_text("utf-8") for name in (PROMPTS, HELDOUT)},
    }
    commands = [f"cd {shlex.quote(str(folder))}", f"gold doctor {CONFIG}", f"gold train {CONFIG}"]
    commands = commands if folder.resolve() != Path.cwd() else commands[1:]
    files[README] = _readme(kind, starter, commands)
    try:
        there = [folder / name for name in files if (folder / name).exists()]
        if there and not overwrite:
            raise ConfigError(f"{there[0]} is there already: give another folder, or --overwrite replaces it")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_text(folder / name, text)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    return commands


def config_text(kind: str, student: str | None = None, teacher: str | None = None) -> str:
    """The commented configuration of a starter."""
    starter = STARTERS[kind]
    values = {
        "student.path": _quoted(student or starter.student),
        "teacher.path": _quoted(teacher or starter.teacher),
        "data.prompts": PROMPTS,
        "data.heldout": HELDOUT,
        "output": "runs/first",
        **starter.settings,
    }
    for section, given, keys in (
        ("student", student, starter.student_keys),
        ("teacher", teacher, starter.teacher_keys),
    ):
        values |= {
            f"{section}.{key}": value for key, value in keys.items() if not given or key != "template_kwargs"
        }
    lines = [
        f"# {starter.summary}",
        "# Paths are relative to the folder in which gold is started. Keys in comments have their defaults;",
        "# gold train --help lists all keys.",
        "",
        *_lines(values, starter.hints),
    ]
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, str], hints: Sequence[str]) -> Iterator[str]:
    known = {key: (default.removeprefix(" = "), meaning) for key, _, default, meaning in keys_of(Config)}
    above = ""
    for key in _SHOWN:
        *sections, name = key.split(".")
        margin, where = "  " * len(sections), ".".join(sections)
        if key.startswith("student.lora.") and key not in values:
            continue
        if where and where != above:
            used = any(each.startswith(f"{where}.") for each in values)
            yield f"{margin[2:]}{'' if used else '# '}{sections[-1]}:"
        above = where
        if key == "objectives":
            yield (
                "objectives:".ljust(_WIDTH)
                + " # terms of the loss, a weighted sum; gold objectives lists all"
            )
            yield "  - {name: reverse_kl, weight: 1.0}"
            continue
        default, meaning = known[key]
        text = f"{margin}{name}: {values[key]}" if key in values else f"{margin}# {name}: {default}"
        yield f"{text.ljust(_WIDTH)} # {meaning}"
        if key == "data.heldout":
            yield from (f"  # {hint}" for hint in hints)


def _readme(kind: str, starter: Starter, commands: Sequence[str]) -> str:
    prompts = (_HERE / f"{kind}.{PROMPTS}").read_text("utf-8").splitlines()
    example = json.loads(prompts[0])
    shape = '{"messages": […]}' if "messages" in example else '{"prompt": "…"}'
    steps = "\n".join(commands)
    return f"""# {kind}: {starter.summary}

```
{steps}
```

`gold doctor` says whether the pair can be trained, and what has to change; `gold train` writes everything into
`runs/first`. Then:

```
gold report runs/first                # the run as one page
gold chat runs/first                  # the student before and after, and the teacher, beside each other
gold eval runs/first                  # the measures again
```

- `{CONFIG}` has the keys that most runs change, with a word on each.
- `{PROMPTS}` and `{HELDOUT}` are examples: put your own there, one `{shape}` on each line, a few hundred
  or more for training, and 64 or more held-out ones. Models never see a `"reference"`; it is for you.
"""


def _path(given: str | None) -> str | None:
    """A model's location from any folder: that of local files is absolute."""
    if given is None:
        return None
    path = Path(given).expanduser()
    return str(path.resolve()) if path.exists() else given


def _quoted(name: str) -> str:
    """A path as YAML, in quotes where it needs them."""
    plain = all(c.isalnum() or c in "/._-" for c in name) and name[:1] not in ("", "-", ".")
    return name if plain else json.dumps(name, ensure_ascii=False)
