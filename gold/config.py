"""The configuration of a run: the schema of its file, overrides, and checks.

A configuration is a YAML file (scalars of YAML 1.2, so `no` is a string and `1e-5` a number), changed by
`section.key=value` overrides. All checks that need no model are done here, and every problem is one line that names
its key. Paths are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gold.data_config import DataConfig, impossible_data
from gold.engine_config import KeyVariable, RolloutConfig, ServerURL
from gold.environment_config import EnvironmentConfig
from gold.errors import ConfigError
from gold.hub_names import with_revision
from gold.overrides import apply_override, named_override
from gold.schema import (
    CountInt,
    Key,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
    keys_of,
    problem_lines,
    shown,
)
from gold.sections import EvaluationSettings, Limits
from gold.train.recipe import LoRA, Objectives, Optimizer, Recipe, Rollout, Term, Training, problems
from gold.yaml_file import read_yaml

TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
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


class RolesConfig(Section):
    """Special tokens by role, for models whose own files are wrong: as the tokenizer writes them."""

    stop: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = None
    """tokens that end a completion; null: from the files and the chat template"""
    bos: Text | None = None
    """token before a plain text; null: from the files"""
    pad: Text | None = None
    """padding token of batches; null: from the files"""


class ModelConfig(Section):
    """A model and how to load it."""

    path: Text | None = None
    """model folder, GGUF file, or Hub id"""
    revision: Text | None = None
    """commit, tag or branch of a Hub id; null: main, or as in ID@revision"""
    gguf_file: Text | None = None
    """name of the GGUF file inside `path`, if the weights come from one"""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """dtype of the weights; auto: as saved, but float32 on a CPU without bfloat16 arithmetic"""
    device: Device = "auto"
    """auto | cpu | cuda | cuda:1 | mps | xpu"""
    attn_implementation: Text | None = None
    """eager | sdpa | flash_attention_2 | …, as in transformers; null: its choice"""
    quantization: Literal["nf4", "int8"] | None = None
    """hold the matrices of the layers in 4 or 8 bits (bitsandbytes), all else in dtype; null: in dtype"""
    trust_remote_code: bool = False
    """run code that comes with the model: it can do whatever you can, so read it first"""
    template_kwargs: TemplateArguments = Field(default={})
    """arguments of the chat template, such as {enable_thinking: false}"""
    roles: RolesConfig = RolesConfig()

    @property
    def source(self) -> str | Path:
        """The location of its tokenizer files."""
        return Path(self.path or "") / self.gguf_file if self.gguf_file else self.location

    @property
    def location(self) -> str:
        """Its folder, file or Hub id, with the revision: ID@revision."""
        return with_revision(self.path or "", self.revision)


class StudentConfig(ModelConfig):
    """The model that is trained."""

    path: Text
    """model folder, GGUF file, or Hub id"""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """dtype of the weights, as for a teacher; bfloat16 is trained on float32 copies: no less memory for weights"""
    lora: LoRA | None = None


class ServedConfig(Section):
    """A server with the teacher; only the tokenizer is then read from `path`."""

    url: ServerURL
    """URL of the API, such as http://localhost:8000/v1"""
    model: Text
    """the model's name on the server"""
    api: Literal["vllm", "sglang", "openai"] = "vllm"
    """API of the server; openai: /v1/completions with echo and logprobs"""
    top_k: CountInt = 20
    """number of top tokens requested per row; 0: only log-probabilities of given tokens"""
    concurrency: PositiveInt = 8
    """maximum of concurrent requests"""
    timeout_s: PositiveFloat = 60.0
    """time limit of a request"""
    retries: CountInt = 5
    """how often a failed request is repeated, with growing pauses"""
    context: PositiveInt | None = None
    """longest sequence in tokens; null: from the config.json in `path`, and from vLLM itself"""
    key_env: KeyVariable | None = None
    """name of the environment variable that holds the server's key"""


class CacheConfig(Section):
    """A folder with the teacher's scores, so that each text is requested once; see docs/teacher-cache.md."""

    path: Text
    """the folder; it is created if it does not exist"""
    top_k: CountInt | None = None
    """number of top tokens kept per row, for a teacher in this process; null: as in the folder, else 20"""
    missing: Literal["ask", "stop"] = "ask"
    """texts that are not in it: ask the teacher and store its answer, or stop; with stop the teacher is not loaded"""
    revision: Text | None = None
    """distinguishes teachers of the same name, such as a commit; null: the digest of its weights, if available"""


class TeacherConfig(ModelConfig):
    """The teacher model."""

    self: Literal["frozen", "ema"] | None = None
    """the student itself instead of `path`: its initial weights, or a moving average of its weights"""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """spread its layers over the GPUs of this process, as transformers does; null: all on `device`"""
    decay: Share = 0.99
    """decay of the moving average per step"""
    batch_tokens: PositiveInt | None = None
    """most tokens per forward pass of a teacher in this process, with little padding; null: 16384 in few passes"""
    served: ServedConfig | None = None
    cache: CacheConfig | None = None

    @property
    def kind(self) -> Literal["self", "cache", "served", "local"]:
        """The source of the scores: the student, only a cache, a server, or a model in this process."""
        if self.self is not None:
            return "self"
        if self.cache is not None and self.cache.missing == "stop":
            return "cache"
        return "local" if self.served is None else "served"

    @model_validator(mode="after")
    def _one_model(self) -> TeacherConfig:
        if self.self is not None:
            for name in (*ModelConfig.model_fields, "device_map", "batch_tokens", "served", "cache"):
                if getattr(self, name) != TeacherConfig.model_fields[name].default:
                    raise ValueError(
                        f"{name} is of another model, and self is the student's own: leave one of them out"
                    )
        return self


class WeighedTeacherConfig(TeacherConfig):
    """One of several teachers; NAME is the value of a prompt's route."""

    weight: PositiveFloat = 1.0
    """its weight in a mix, relative to the others"""


class TrainConfig(Training):
    """The training loop."""

    checkpoint_every: PositiveInt = 50
    """steps between checkpoints"""
    keep_last: PositiveInt = 2
    """checkpoints kept"""
    doctor: Literal["stop", "report"] = "stop"
    """if `gold doctor` finds that a pair cannot be trained: stop, or report it and continue"""
    trackers: Annotated[tuple[TrackerName, ...], Field(strict=False)] | None = None
    """where metrics and samples go besides the run folder: tensorboard, wandb, trackio, mlflow"""


class EvaluateConfig(EvaluationSettings):
    """Evaluation on held-out prompts before, during and after training."""

    every: PositiveInt = 50
    """steps between evaluations"""
    prompts: PositiveInt = 64
    """number of held-out prompts used"""


class PushConfig(Section):
    """A model repository on the Hugging Face Hub, to which student/ is pushed when the run has ended; the id alone is
    enough. The token is that of `hf auth login` or HF_TOKEN."""

    id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """NAME/MODEL; it is created if there is none"""
    private: bool = True
    """whether a repository that is created is private"""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"id": given} if isinstance(given, str) else given


class Config(Section):
    """One run."""

    student: StudentConfig
    teachers: dict[TeacherName, WeighedTeacherConfig] = Field(default={})
    teacher: TeacherConfig | None = None
    route: Text | None = None
    """column that names the teacher of a prompt, if there are several"""
    mix: Literal["linear", "log_linear"] | None = None
    """several teachers as one distribution for every prompt: Σ w q, or Π q^w normalised"""
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig | None = None
    objectives: Objectives = (Term(),)
    """terms of the loss, a weighted sum"""
    optimizer: Optimizer = Optimizer()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: Text
    """run folder; it must not contain a run, unless that is resumed or overwritten"""
    push_to_hub: PushConfig | None = None

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

    @property
    def recipe(self) -> Recipe:
        """The settings of the training loop."""
        train = {key: getattr(self.train, key) for key in Training.model_fields}
        rollout = {key: getattr(self.rollout, key) for key in Rollout.model_fields}
        order = self.data.order
        return Recipe(self.objectives, order=order, **rollout, **dict(self.optimizer), **train)

    @property
    def limits(self) -> Limits:
        """The limits of conversations."""
        return self.environment or Limits()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """The configuration in a YAML file, changed by `section.key=value` overrides in order.

        Override values are YAML; a list item is addressed by its index: `objectives.0.weight=0.5`.

        Raises ConfigError: one line per problem, with the file and line number, or the override, that caused it.
        """
        tree, line_of = read_yaml(Path(path), ConfigError)
        if tree is None:
            raise ConfigError(f"{path}: is empty; a run needs at least student, teacher, data and output")
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected sections such as student and teacher, got {shown(tree)}")
        origin_of = {key: f"{path}:{line}: " for key, line in line_of.items()}
        for override in overrides:
            changed = apply_override(tree, override)
            origin_of = {key: origin for key, origin in origin_of.items() if key[: len(changed)] != changed}
            origin_of[changed] = f"{named_override(override)}: "

        def where(key: Key) -> str:
            """The file and line, or the override, of the value or else of its section."""
            above = (key[:length] for length in range(len(key), 0, -1))
            below = (known for known in origin_of if known[: len(key)] == key)  # an override made the section
            return next((origin_of[known] for known in (*above, *below) if known in origin_of), f"{path}: ")

        return cls._validated(tree, where)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Config:
        """The configuration of a nested dictionary; the inverse of `to_dict`.

        Raises ConfigError: one line per problem, naming its key.
        """
        if options:
            raise TypeError(f"Config.model_validate takes a dictionary alone, got {sorted(options)}")
        return cls._validated(obj, lambda key: "")

    @classmethod
    def _validated(cls, tree: Any, where: Callable[[Key], str]) -> Config:
        """First checks the keys and their values, which loads nothing; then their combinations."""
        try:
            config: Config = cls.__pydantic_validator__.validate_python(tree)
        except ValidationError as error:
            raise ConfigError(*problem_lines(error, cls, where)) from error
        terms, found = [], []
        for place, term in enumerate(config.objectives):
            try:
                terms.append(term.resolved())
            except ConfigError as error:
                found += [f"objectives.{place}.{line}" for line in error.args]
        config = config.model_copy(update={"objectives": tuple(terms)})
        if found := found or list(_impossible(config)):
            raise ConfigError(*(f"{where(_key_of(line))}{line}" for line in found))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of JSON types with all values, including defaults."""
        return self.model_dump(mode="json")


def _key_of(line: str) -> Key:
    """The key at the beginning of a line."""
    return tuple(int(part) if part.isdecimal() else part for part in line.split(":")[0].split("."))


def describe() -> str:
    """Every key with its type, default and meaning, one per line, for display."""
    lines = []
    for key, kind, default, meaning in keys_of(Config):
        if kind == "section":
            lines.append(f"\n{key}: {meaning}")
        else:
            margin = "  " if "." in key else "\n"
            lines.append(f"{margin}{key + default:<42} {meaning} [{kind}]")
    return "\n".join(lines).strip() + "\n"


# Combinations


def _impossible(config: Config) -> Iterator[str]:
    """One line for each invalid combination of settings, beginning with the key."""
    data = config.data
    yield from impossible_data(data)
    yield from problems(config.recipe, has_verifier=data.task is not None or config.environment is not None)
    if config.environment is not None and config.rollout.staleness:
        yield (
            "rollout.staleness: turns of a conversation follow one another, and are not drawn a step ahead: set it to 0"
        )
    if config.environment is not None and config.rollout.policy == "initial":
        yield "rollout.policy: an environment answers the student as it is: set it to live"
    yield from _impossible_revisions(config)
    if config.rollout.completions is not None and config.rollout.policy == "live":
        yield "rollout.completions: is of rollout.policy initial: set that, or leave the folder out"
    yield from _impossible_quantization(config)
    yield from _impossible_teachers(config)
    for name, teacher in config.named_teachers.items():
        yield from _impossible_source(
            config, teacher, "teacher" if config.teacher is not None else f"teachers.{name}"
        )


def _impossible_revisions(config: Config) -> Iterator[str]:
    """Two revisions of one model, or one of a folder."""
    single = config.teacher is not None
    named = {"teacher" if single else f"teachers.{name}": t for name, t in config.named_teachers.items()}
    for where, model in {"student": config.student, **named}.items():
        try:
            with_revision(model.path or "", model.revision)
        except ConfigError as error:
            yield f"{where}.revision: {error}"


def _impossible_quantization(config: Config) -> Iterator[str]:
    """Quantized weights that cannot be made, or would be trained."""
    key = "teacher" if config.teacher is not None else "teachers"
    named = {f"{key}.{name}" if key == "teachers" else key: t for name, t in config.named_teachers.items()}
    for where, model in {"student": config.student, **named}.items():
        if model.quantization is None:
            continue
        if isinstance(model, TeacherConfig) and model.kind in ("served", "cache"):
            yield f"{where}.quantization: its weights are not in this process: leave it out"
        if model.gguf_file or str(model.path).endswith(".gguf"):
            yield f"{where}.quantization: weights of a GGUF file have their own: leave it out"
    if config.student.quantization is not None and config.student.lora is None:
        yield (
            f"student.quantization: {config.student.quantization} weights are not trained themselves: train adapters "
            "on them (student.lora={}), or leave it out"
        )
    if config.student.quantization is not None and config.train.sharding == "fsdp":
        yield "train.sharding: quantized weights are not sharded: set it to none, or leave student.quantization out"


def _impossible_source(config: Config, teacher: TeacherConfig, key: str) -> Iterator[str]:
    """Missing settings of a teacher, and objectives that its server or cache cannot provide for."""
    from gold.losses import find

    if teacher.path is None and teacher.self is None:
        yield f"{key}.path: is missing"
    for name in ("batch_tokens", "device_map", "attn_implementation"):
        if getattr(teacher, name) is not None and teacher.kind != "local" and teacher.self is None:
            yield f"{key}.{name}: is of a teacher in this process: leave it out"
    if teacher.device_map is not None and teacher.device != "auto":
        yield f"{key}.device_map: {key}.device names one place for all layers: keep one of the two"
    top_k: int | None
    if teacher.served is not None:
        where, top_k, instead = f"{key}.served", teacher.served.top_k, "a teacher in this process"
    elif teacher.cache is not None:
        where, top_k, instead = f"{key}.cache", teacher.cache.top_k, "a teacher without a cache"
    else:
        return
    gives = "tokens" if top_k == 0 else "top_k"
    for name in sorted({term.name for term in config.objectives if term.weight}):
        if (needs := find(name).needs) not in ("nothing", "tokens", gives):
            needed = f"{where}.top_k above 0" if needs == "top_k" else instead
            yield f"{where}: gives {gives}, and objective {name} needs {needs}: it takes {needed}"
    if teacher.served and teacher.cache and teacher.cache.top_k is not None:
        yield f"{key}.cache.top_k: a server is asked for {key}.served.top_k: leave it out"


def _impossible_teachers(config: Config) -> Iterator[str]:
    """Invalid combinations of teachers."""
    from gold.data import UNDERSTOOD
    from gold.losses import DivergenceRow, find

    names = list(config.teachers)
    if config.teacher is not None and names:
        yield "teachers: teacher is given too: keep one of the two"
    for key, value in (("route", config.route), ("mix", config.mix)):
        if value is not None and not names:
            yield f"{key}: there is one teacher: name several in teachers, or leave it out"
    if len(names) > 1 and (config.route is None) == (config.mix is None):
        got = "neither is" if config.route is None else "both are"
        yield f"teachers: a route names the teacher of a prompt, a mix takes all: give one of the two, {got} given"
    for key, field in (("route", config.route), ("data.weight", config.data.weight)):
        if field in UNDERSTOOD:
            yield f"{key}: {field} has another meaning in a row: choose another column"
    if config.route is not None and config.route == config.data.weight:
        yield f"data.weight: {config.route} is the column of the route: choose another column"
    for name, teacher in config.teachers.items():
        if config.mix is None and teacher.weight != 1:
            yield f"teachers.{name}.weight: belongs to a mix: set mix, or leave it out"
    for term in config.objectives if config.mix is not None else ():
        row, support = find(term.name), term.options.get("support")
        by_bytes = isinstance(row, DivergenceRow) and support == "bytes"
        if term.weight and row.needs != "nothing" and not by_bytes:
            name = f"{row.name} on {support}" if isinstance(row, DivergenceRow) else row.name
            yield f"mix: {name} cannot be computed for a mix of teachers: choose a divergence on bytes, or a route"
