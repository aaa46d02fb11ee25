"""One run as one value: the schema of a configuration file, its overrides, and what it refuses.

A configuration is a YAML file (scalars of YAML 1.2, so `no` is a word and `1e-5` a number), changed by
`section.key=value` overrides. Everything that can be judged without loading a model is judged here, and every
problem is one line that names its key. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gold.errors import ConfigError
from gold.yaml_file import Key, parse_yaml, read_yaml

PositiveInt = Annotated[int, Field(ge=1)]
CountInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")]


def _for_template(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    from gold.tokenize.templates import check_arguments

    try:
        check_arguments(arguments)
    except ConfigError as error:
        raise ValueError(
            str(error).removeprefix("template_kwargs").removeprefix(": ").removeprefix(".")
        ) from None
    return arguments


TemplateArguments = Annotated[dict[str, JsonValue], AfterValidator(_for_template)]


class _Section(BaseModel):
    """A part of the configuration: unknown keys and look-alike types are refused, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class RolesConfig(_Section):
    """Special tokens by role, where a model's own files are wrong: as its tokenizer writes them."""

    stop: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = None
    """tokens that end a completion; null: as the files and the chat template say"""
    bos: Text | None = None
    """token in front of a plain text; null: as the files say"""
    pad: Text | None = None
    """token that fills batches; null: as the files say"""


class StudentConfig(_Section):
    """The model that learns."""

    path: Text
    """model folder, GGUF file, or Hub id"""
    gguf_file: Text | None = None
    """name of the GGUF file inside `path`, where the weights come from one"""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """dtype of the weights; auto: as saved, float32 on a CPU that cannot multiply bfloat16 itself;
    bfloat16 is trained on float32 copies, so it saves no memory of weights"""
    device: Device = "auto"
    """auto | cpu | cuda | cuda:1 | mps | xpu"""
    trust_remote_code: bool = False
    """run code that comes with the model: it can do whatever you can, so read it first"""
    template_kwargs: TemplateArguments = {}
    """what the chat template is given beside messages, such as {enable_thinking: false}"""
    roles: RolesConfig = RolesConfig()


class ServedConfig(_Section):
    """A server that has the teacher; `path` is then read for its tokenizer alone."""

    url: Text
    """where the API is, such as http://localhost:8000/v1"""
    model: Text
    """what the server calls the model"""
    api: Literal["vllm", "sglang", "openai"] = "vllm"
    """what it understands; openai: /v1/completions with echo and logprobs"""
    top_k: CountInt = 20
    """likeliest tokens of each row that are asked for; 0: log-probabilities of given tokens alone"""
    concurrency: PositiveInt = 8
    """requests under way at a time"""
    timeout_s: PositiveFloat = 60.0
    """longest time of a request"""
    retries: CountInt = 5
    """how often a request that failed is sent again, with growing pauses"""
    context: PositiveInt | None = None
    """longest sequence in tokens that it takes; null: as the config.json in `path`, and vLLM itself, say"""
    key_env: Text | None = None
    """name of the environment variable that holds the server's key"""

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        from gold.teachers.http import check_url  # loads torch, which this module's import must not

        try:
            check_url(url)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("url: ")) from None
        return url

    @field_validator("key_env")
    @classmethod
    def _is_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("expected the name of an environment variable, never a key itself")
        return name


class CacheConfig(_Section):
    """A folder that keeps what the teacher says, so that it is asked once; see docs/teacher-cache.md."""

    path: Text
    """the folder; it is made where there is none"""
    top_k: CountInt | None = None
    """likeliest tokens of each row that are kept of a teacher in this process; null: as in the folder, else 20"""
    missing: Literal["ask", "stop"] = "ask"
    """texts that are not in it: ask the teacher and keep its answer, or stop; with stop the teacher is not loaded"""
    revision: Text | None = None
    """what tells the teacher from others of its name, such as a commit; null: its weights, where they are here"""


class TeacherConfig(_Section):
    """The model that is learned from."""

    self: Literal["frozen", "ema"] | None = None
    """the student itself in place of `path`: its weights at the start, or their moving average"""
    decay: Share = 0.99
    """of that average: what is kept of it at each step"""
    path: Text | None = None
    """model folder, GGUF file, or Hub id"""
    served: ServedConfig | None = None
    cache: CacheConfig | None = None
    gguf_file: Text | None = None
    """name of the GGUF file inside `path`, where the weights come from one"""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """dtype of the weights; auto: as saved, float32 on a CPU that cannot multiply bfloat16 itself"""
    device: Device = "auto"
    """auto | cpu | cuda | cuda:1 | mps | xpu"""
    trust_remote_code: bool = False
    """run code that comes with the model: it can do whatever you can, so read it first"""
    template_kwargs: TemplateArguments = {}
    """what the chat template is given beside messages, such as {enable_thinking: false}"""
    roles: RolesConfig = RolesConfig()

    @field_validator("path")
    @classmethod
    def _is_there(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None and info.data.get("self", "invalid") is None:
            raise PydanticCustomError("missing", "is missing")
        return path

    @model_validator(mode="after")
    def _one_model(self) -> TeacherConfig:
        if self.self is not None:
            for name in (
                "path",
                "served",
                "cache",
                "gguf_file",
                "dtype",
                "device",
                "trust_remote_code",
                "roles",
                "template_kwargs",
            ):
                if getattr(self, name) != TeacherConfig.model_fields[name].default:
                    raise ValueError(
                        f"{name} is of another model, and self is the student's own: leave one of them out"
                    )
        return self


class WeighedTeacherConfig(TeacherConfig):
    """One of several teachers; NAME is what a prompt's route says."""

    weight: PositiveFloat = 1.0
    """its share of a mix, against the others'"""


class TaskConfig(_Section):
    """A procedural task: prompts that are made, and a verifier that scores completions."""

    name: Text
    """running_sums, or a task of reasoning-gym such as countdown"""
    options: dict[str, JsonValue] = {}
    """options of the task itself"""
    seed: CountInt = 0
    """seed of the prompts"""
    train: PositiveInt = 400
    """training prompts"""
    heldout: PositiveInt = 128
    """held-out prompts"""


class DataConfig(_Section):
    """Where prompts come from: exactly one of `prompts` and `task`."""

    prompts: Text | None = None
    """JSONL file with `prompt` or `messages`, and optionally `completion`"""
    task: TaskConfig | None = None
    """procedural task with a verifier"""
    heldout: Text | None = None
    """JSONL file of held-out prompts; null: a share of `prompts`, split by hash"""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of `prompts` that is held out where no `heldout` file is given"""


class RolloutConfig(_Section):
    """How the student writes."""

    temperature: PositiveFloat = 1.0
    """sampling temperature"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """nucleus: the smallest set of tokens with this mass"""
    max_new_tokens: PositiveInt = 128
    """length limit of a completion, in student tokens"""
    num_generations: PositiveInt = 4
    """completions per prompt"""
    on_policy: Share = 1.0
    """λ: expected share of sequences that the student writes; the rest are the data's completions, one a prompt"""
    batch: PositiveInt = 32
    """sequences generated together"""


class ObjectiveConfig(_Section):
    """One term of the loss; beside these keys the objective's own options: `gold objectives` lists them."""

    model_config = ConfigDict(extra="allow")

    name: Text = "reverse_kl"
    """what is minimised"""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """factor of this term"""

    @property
    def options(self) -> dict[str, Any]:
        """The objective's own options."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _resolved(self) -> ObjectiveConfig:
        """The objective with all of its options written out."""
        from gold.losses import find  # loads torch, which this module's import must not

        try:
            row = find(self.name)
        except ConfigError as error:
            raise ValueError(f"name: {error}") from None
        for option in self.options:
            if option not in row.arguments and (meant := _closest(option, list(type(self).model_fields))):
                raise ValueError(f"{option}: unknown key{meant}")
        extra = row.resolve(self.options)
        if self.__pydantic_extra__ is not None:
            self.__pydantic_extra__.clear()
            self.__pydantic_extra__.update(extra)
        return self


class OptimizerConfig(_Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-5
    """highest learning rate"""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled weight decay"""
    warmup_steps: CountInt = 10
    """steps of linear warm-up"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """decay after the warm-up"""
    final_lr_share: Share = 0.1
    """share of `lr` that is left at the last step"""
    max_grad_norm: PositiveFloat = 1.0
    """largest norm of the gradient"""


class TrainConfig(_Section):
    """The training loop."""

    steps: PositiveInt = 100
    """optimizer steps"""
    prompts_per_step: PositiveInt = 8
    """prompts per optimizer step"""
    micro_batch_size: PositiveInt = 8
    """sequences per forward and backward pass; the rest is accumulated"""
    seed: CountInt = 0
    """seed of prompt order and sampling"""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """mixed precision; auto: bf16 on a GPU that has it, else none"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    checkpoint_every: PositiveInt = 50
    """steps between checkpoints"""
    keep_last: PositiveInt = 2
    """checkpoints kept"""
    doctor: Literal["stop", "report"] = "stop"
    """what `gold doctor` finds of the pair before the run: stop where it cannot be trained, or report that and go on"""
    bad_steps_allowed: CountInt = 3
    """steps in a row with NaN or infinite loss or gradient before training stops"""


class EvaluateConfig(_Section):
    """Evaluation on held-out prompts before, during and after training."""

    every: PositiveInt = 50
    """steps between evaluations"""
    prompts: PositiveInt = 64
    """held-out prompts that are used"""
    num_generations: PositiveInt = 1
    """completions per prompt"""
    samples: CountInt = 4
    """prompts whose completions and signal are written to samples.jsonl"""
    micro_batch_size: PositiveInt = 16
    """sequences per forward pass"""


class Config(_Section):
    """One run."""

    student: StudentConfig
    teachers: dict[TeacherName, WeighedTeacherConfig] = {}
    teacher: TeacherConfig | None = None
    route: Text | None = None
    """field of a prompt's line that names its teacher, of several"""
    mix: Literal["linear", "log_linear"] | None = None
    """several teachers as one distribution for every prompt: Σ w q, or Π q^w normalised"""
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objectives: Annotated[
        tuple[ObjectiveConfig, ...], Field(strict=False, default_factory=lambda: (ObjectiveConfig(),))
    ]
    """terms of the loss, added up with their weights"""
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: Text
    """run folder; it must hold no run that has begun, unless that is resumed or overwritten"""

    @field_validator("teacher")
    @classmethod
    def _has_teacher(cls, teacher: TeacherConfig | None, info: ValidationInfo) -> TeacherConfig | None:
        if teacher is None and info.data.get("teachers", "invalid") == {}:
            raise PydanticCustomError("missing", "is missing")
        return teacher

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name; a single one is called `teacher`."""
        return {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """The configuration in a YAML file, changed by `section.key=value` overrides in their order.

        Override values are YAML; a list item is addressed by its index: `objectives.0.weight=0.5`.

        Raises ConfigError: one line per problem, with file and line number, or the override, that caused it.
        """
        tree, line_of = read_yaml(Path(path), ConfigError)
        if tree is None:
            raise ConfigError(f"{path}: is empty; a run needs at least student, teacher, data and output")
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected sections such as student and teacher, got {_shown(tree)}")
        origin_of = {key: f"{path}:{line}: " for key, line in line_of.items()}
        for override in overrides:
            changed = _apply(tree, override)
            origin_of = {key: origin for key, origin in origin_of.items() if key[: len(changed)] != changed}
            origin_of[changed] = f"{_named(override)}: "

        def where(key: Key) -> str:
            """The file and line, or the override, that the value or else the section comes from."""
            above = (key[:length] for length in range(len(key), 0, -1))
            below = (known for known in origin_of if known[: len(key)] == key)  # an override made the section
            return next((origin_of[known] for known in (*above, *below) if known in origin_of), f"{path}: ")

        return _validated(cls, tree, where)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Config:
        """The configuration that a nested dictionary describes; `to_dict` gives one back.

        Raises ConfigError: one line per problem, naming its key.
        """
        if options:
            raise TypeError(f"Config.model_validate takes a dictionary alone, got {sorted(options)}")
        return _validated(cls, obj, lambda key: "")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of JSON types with every value written out."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if problems := list(_impossible(self)):
            raise ValueError(*problems)
        return self


def check_data(
    config: Config, *, has_completions: bool, has_verifier: bool, has_context: bool = True
) -> None:
    """Nothing, where the loaded data has what the teacher, the objectives and λ ask for.

    Called with the data in hand and before a model is loaded.

    Raises ConfigError: the first thing that is missing.
    """
    if config.rollout.on_policy < 1 and not has_completions:
        raise ConfigError(
            f"rollout.on_policy: at {config.rollout.on_policy:g} the data's completions are used, and there "
            "are none: give the prompts completions, or set it to 1"
        )
    if "reward" in _active(config) and not has_verifier:
        raise ConfigError("objective reward needs a task with a verifier: set data.task, or leave reward out")
    from gold.losses import find

    graded = all(find(name).needs != "nothing" for name in _active(config))
    if config.teacher is not None and config.teacher.self is not None and graded and not has_context:
        raise ConfigError(
            "teacher.self: the student would learn from itself what it knows already: give prompts a "
            "teacher_context, or name another teacher"
        )


def describe() -> str:
    """Every key with its type, default and meaning, one a line, for people."""
    lines = []
    for key, kind, default, meaning in _keys(Config):
        if kind == "section":
            lines.append(f"\n{key}: {meaning}")
        else:
            margin = "  " if "." in key else "\n"
            lines.append(f"{margin}{key + default:<42} {meaning} [{kind}]")
    return "\n".join(lines).strip() + "\n"


# What cannot work together


def _active(config: Config) -> set[str]:
    """Names of the objectives that count."""
    return {objective.name for objective in config.objectives if objective.weight > 0}


def _impossible(config: Config) -> Iterator[str]:
    data, rollout, active = config.data, config.rollout, _active(config)
    if data.prompts is None and data.task is None:
        yield "data: neither prompts nor task is given: name a JSONL file or a task"
    if data.prompts is not None and data.task is not None:
        yield "data: both prompts and task are given: keep one"
    if data.heldout is not None and data.task is not None:
        yield "data: a task makes its own held-out prompts (data.task.heldout): leave data.heldout out"
    if not config.objectives:
        yield "objectives: the list is empty: name at least one"
    elif not active:
        yield "objectives: every weight is 0: nothing would be learned"
    if "reward" in active and data.task is None:
        yield "objectives: reward needs a task with a verifier: set data.task, or leave reward out"
    yield from _impossible_teachers(config)
    from gold.losses import find

    for key, teacher in config.named_teachers.items():
        own = "teacher" if config.teacher is not None else f"teachers.{key}"
        top_k: int | None
        if teacher.served is not None:
            where, top_k, more = f"{own}.served", teacher.served.top_k, "a teacher in this process"
        elif teacher.cache is not None:
            where, top_k, more = f"{own}.cache", teacher.cache.top_k, "a teacher without a cache"
        else:
            continue
        gives = "tokens" if top_k == 0 else "top_k"
        for name in sorted(active):
            if (needs := find(name).needs) not in ("nothing", "tokens", gives):
                less = f"{where}.top_k above 0" if needs == "top_k" else more
                yield f"{where}: gives {gives}, and objective {name} needs {needs}: it takes {less}"
        if teacher.served and teacher.cache and teacher.cache.top_k is not None:
            yield f"{own}.cache.top_k: a server is asked for {own}.served.top_k: leave it out"
    from gold.losses.sampling import unfit_sampling

    yield from unfit_sampling(
        {o.name: o.options for o in config.objectives if o.weight > 0},
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        num_generations=rollout.num_generations,
        on_policy=rollout.on_policy,
    )


def _impossible_teachers(config: Config) -> Iterator[str]:
    from gold.data import LINE_KEYS  # loads numpy

    names, plural = list(config.teachers), len(config.teachers) > 1
    if config.teacher is not None and names:
        yield "teachers: teacher is given too: keep one of the two"
    for key, value in (("route", config.route), ("mix", config.mix)):
        if value is not None and not names:
            yield f"{key}: there is one teacher: name several in teachers, or leave it out"
    if plural and (config.route is None) == (config.mix is None):
        got = "neither is" if config.route is None else "both are"
        yield f"teachers: a route says which of them has a prompt, a mix takes all: give one of the two, {got} given"
    if config.route in LINE_KEYS:
        yield f"route: {config.route} has a meaning of its own in a prompt's line: choose another field"
    for name, teacher in config.teachers.items():
        if config.mix is None and teacher.weight != 1:
            yield f"teachers.{name}.weight: belongs to a mix: set mix, or leave it out"
    from gold.losses import DivergenceRow, find

    for objective in config.objectives if config.mix is not None else ():
        row = find(objective.name)
        by_bytes = isinstance(row, DivergenceRow) and objective.options["support"] == "bytes"
        if objective.weight and row.needs != "nothing" and not by_bytes:
            what = (
                f"{row.name} on {objective.options['support']}"
                if isinstance(row, DivergenceRow)
                else row.name
            )
            yield f"mix: {what} cannot be taken of a mix of teachers: choose a divergence on bytes, or a route"


# Reading


def _apply(tree: dict[str, Any], override: str) -> Key:
    """The key that a `section.key=value` override has set in the tree."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{_named(override)}: expected section.key=value")
    value, _ = parse_yaml(text, _named(override), ConfigError, numbered=False)
    if parts[0] == "objectives" and len(parts) > 1:
        tree.setdefault("objectives", [{"name": "reverse_kl"}])
    place: Any = tree
    key: Key = ()
    for part in parts[:-1]:
        step = _step(place, part, key, override)
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place, key = place[step], (*key, step)
    step = _step(place, parts[-1], key, override)
    place[step] = value
    return (*key, step)


def _step(place: Any, part: str, key: Key, override: str) -> str | int:
    """The key or index that `part` names in a place of the tree."""
    if isinstance(place, dict):
        return part
    if isinstance(place, list):
        if not part.isdecimal() or int(part) >= len(place):
            last = f"the last is {len(place) - 1}" if place else "the list is empty"
            raise ConfigError(f"{_named(override)}: there is no {_dotted((*key, part))}: {last}")
        return int(part)
    raise ConfigError(f"{_named(override)}: {_dotted(key)} is {_shown(place, key)}, which has no keys")


def _named(override: str) -> str:
    """What errors call an override; what is set for a teacher can be a key that was typed into the wrong place."""
    dotted, equals, _ = override.partition("=")
    if not dotted.strip().startswith("teacher"):
        return f"override {override}"
    return f"override {dotted}=…" if equals else "override teacher…"


# Judging and saying what is wrong


def _validated(cls: type[Config], tree: Any, where: Callable[[Key], str]) -> Config:
    """The configuration in a tree, or a ConfigError with one line per problem."""
    try:
        config: Config = cls.__pydantic_validator__.validate_python(tree)
    except ValidationError as error:
        problems = [line for each in error.errors(include_url=False) for line in _problems(dict(each), where)]
        raise ConfigError(*problems) from error
    return config


def _problems(error: dict[str, Any], where: Callable[[Key], str]) -> Iterator[str]:
    """The lines that tell a person about one validation error."""
    key: Key = error["loc"]
    context = error.get("ctx", {})
    kind = error["type"]
    if kind == "value_error":
        for line in map(str, context["error"].args):
            # At the root and in an objective, a line starts with the key that it is about.
            own_key = (*key, *line.split(":")[0].split("."))
            if not key:
                yield f"{where(own_key)}{line}"
            elif key[0] == "objectives" and str(own_key[-1]).isidentifier():
                yield f"{where(own_key)}{_dotted(key)}.{line}"
            else:
                yield f"{where(key)}{_dotted(key)}: {line}"
        return
    if key and key[-1] == "[key]":
        yield f"{where(key[:-1])}{_dotted(key[:-1])}: a name has letters, digits, - and _ alone"
        return
    got = _shown(error["input"], key)
    limits = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    if kind == "missing":
        text = "is missing"
    elif kind == "extra_forbidden":
        text = f"unknown key{_known_instead(key)}"
    elif kind == "literal_error":
        choices = [str(choice) for choice in typing.get_args(_annotation_at(key))]
        text = f"expected {' | '.join(choices)}, got {got}{_closest(error['input'], choices)}"
    elif kind in limits:
        (limit,) = context.values()
        text = f"must be {limits[kind]} {limit:g}, got {got}"
    elif kind in ("too_short", "too_long"):
        text = f"expected {context.get('max_length', context.get('min_length'))} values, got {got}"
    elif kind == "string_pattern_mismatch":
        text = f"expected auto, cpu, cuda, cuda:1, mps or xpu, got {got}"
    elif kind == "string_too_short":
        text = "must not be empty"
    else:
        text = f"expected {_EXPECTED.get(kind, error['msg'])}, got {got}"
    yield f"{where(key)}{_dotted(key) or 'configuration'}: {text}"


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "keys and values",
    "recursion_loop": "a value that does not contain itself",
    "string_type": "text",
    "tuple_type": "a list",
}


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


_NEVER_SHOWN = {"served", "url", "key_env"}
"""Where a server's key may have been written by mistake."""


def _shown(value: Any, key: Key = ()) -> str:
    """A value as a person wrote it, shortened; quotes show that it is text."""
    if "served" in key and key[-1] in _NEVER_SHOWN:
        return "something else"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _closest(value: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _known_instead(key: Key) -> str:
    """What an unknown key was probably meant to be."""
    here, name = list(_annotation_at(key[:-1]).model_fields), str(key[-1])
    if close := _closest(name, here):
        return close
    elsewhere = [
        known for known, *_ in _keys(Config) if known.split(".")[-1] == name and ".NAME." not in known
    ]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(here)}"


def _plain(annotation: Any) -> Any:
    """The annotation without its constraints and without None."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return _plain(next(one for one in typing.get_args(annotation) if one is not type(None)))
    return annotation


def _annotation_at(key: Key) -> Any:
    """The type of the value at a key of the schema."""
    found: Any = Config
    for part in key:
        if isinstance(part, int):
            found = _plain(typing.get_args(found)[0])
        elif typing.get_origin(found) is dict:
            found = _plain(typing.get_args(found)[1])
        else:
            found = _plain(found.model_fields[part].annotation)
    return found


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of a section and of those below it."""
    for name, field in section.model_fields.items():
        plain = _plain(field.annotation)
        listed = typing.get_origin(plain) is tuple and typing.get_args(plain)[-1] is ...
        named = typing.get_origin(plain) is dict
        inner = _plain(typing.get_args(plain)[1 if named else 0]) if listed or named else plain
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            doc = (inner.__doc__ or "").strip()
            yield f"{prefix}{name}", "section", "", doc
            yield from _keys(inner, f"{prefix}{name}.{'0.' if listed else 'NAME.' if named else ''}")
            continue
        if typing.get_origin(plain) is Literal:
            kind = " | ".join(map(str, typing.get_args(plain)))
        else:
            names = {int: "whole number", float: "number", bool: "true | false", str: "text"}
            kind = names.get(plain, "keys and values" if typing.get_origin(plain) is dict else "list")
        default = (
            " (required)"
            if field.is_required()
            else f" = {_shown(field.get_default(call_default_factory=True))}"
        )
        yield f"{prefix}{name}", kind, default, field.description or ""
