"""Builds the objects of a configuration: prompts, models, teachers. Other modules get plain values."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from gold.activity import doing
from gold.build_data import RunData, graded_by
from gold.cache.store import find_origin
from gold.config import CacheConfig, Config, ModelConfig, StudentConfig, TeacherConfig
from gold.data import Prompt, any_messages
from gold.doctor.examiner import Examiner
from gold.doctor.prompts import check_longest, readers_of_sides
from gold.doctor.side import Side, read_side
from gold.environments.protocol import tools_of
from gold.errors import ConfigError, ModelError
from gold.evaluate import EvaluationPlan
from gold.files import adapter_base
from gold.hub_names import split_revision
from gold.models import adapters, quantization
from gold.models.files import check_files
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.models.pretrained import check_attention, pick_device
from gold.rollout.vllm import VLLMEngine
from gold.rollout.vllm_process import ColocatedEngine, ServerCommand
from gold.teachers.absent import AbsentTeacher
from gold.teachers.cached import CachedTeacher
from gold.teachers.ema import SelfTeacher
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher
from gold.teachers.served import ServedTeacher
from gold.teachers.several import Teachers
from gold.tokenize.compare import differences
from gold.tokenize.load import has_tokenizer
from gold.tokenize.roles import Roles
from gold.tokenize.templates import Rendering
from gold.train.input_digests import of_files, of_prompts, of_tools
from gold.train.preflight import accelerator_of, check_lengths
from gold.train.resume_rules import Inputs
from gold.train.trackers import Tracker

Note = Callable[[str], None]


# Engines


def try_engine(
    engine: VLLMEngine, model: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int
) -> None:
    """Checks that the prompts fit, pushes a model's weights to an engine, and checks by draws that it works; see
    ``ProbedEngine.probe``.

    Raises:
        EngineError: it does not.
    """
    check_lengths(engine, model, prompts, max_new_tokens)
    lm = model.lm
    if not adapters.is_adapted(lm):
        engine.probe(model, prompts, lm.state_dict(), 0)
    elif engine.adapters:
        engine.probe(model, prompts, adapters.adapter_state(lm), 0, adapters.adapter_config(lm))
    else:
        engine.probe(model, prompts, adapters.MergedWeights(lm), 0)


@contextlib.contextmanager
def rollout_engine(
    config: Config, student: ModelConfig, log: Path | None = None
) -> Iterator[VLLMEngine | None]:
    """The rollout engine of a configuration, which is closed in the end; None: the student itself.

    ``log``: the file for what a server that gold starts prints.

    Raises:
        ConfigError: a server that gold would start for several processes.
    """
    given = config.rollout.engine.vllm
    if given is None:
        yield None
        return
    options = {
        name: getattr(given, name)
        for name in (
            *("model", "transfer", "folder", "concurrency"),
            *("timeout_s", "retries", "key_env", "adapters"),
        )
    }
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    engine: VLLMEngine
    if given.url is not None:
        if given.sleep and not alone:
            raise ConfigError(
                "rollout.engine.vllm.sleep: other processes draw while one lets it sleep; set it to 0"
            )
        pushes = os.environ.get("RANK", "0") == "0"
        engine = VLLMEngine(given.url, sleep=given.sleep or 0, pushes=pushes, **options)
    else:
        if not alone:
            raise ConfigError(
                "rollout.engine.vllm: colocated serves one process; start a server for several, and give its url"
            )
        lora = student.lora if isinstance(student, StudentConfig) else None
        on_gpu = pick_device(student.device).type == "cuda"
        sleep = given.sleep if given.sleep is not None else int(on_gpu)
        command = ServerCommand(
            split_revision(student.location)[0],
            given.python or sys.executable,
            given.dtype or student.dtype,
            given.context,
            sleeps=sleep > 0,
            trust_remote_code=student.trust_remote_code,
            lora_rank=lora.rank if given.adapters and lora is not None else None,
            revision=split_revision(student.location)[1],
            arguments=given.arguments,
        )
        engine = ColocatedEngine(command, log=log, sleep=sleep, **options)
    try:
        yield engine
    finally:
        engine.close()


# Inputs


def evaluation_of(config: Config) -> EvaluationPlan:
    """The evaluation plan of a configuration."""
    return EvaluationPlan(
        num_generations=config.evaluate.num_generations,
        max_new_tokens=config.rollout.max_new_tokens,
        samples=config.evaluate.samples,
        micro_batch_size=config.evaluate.micro_batch_size,
        micro_batch_tokens=config.evaluate.micro_batch_tokens,
        generation_batch_size=config.rollout.generation_batch_size,
        thinking=config.rollout.thinking,
        thinking_budget=config.rollout.thinking_budget,
        seed=config.train.seed,
        branches=config.evaluate.branches or 0.0,
    )


def inputs_of(config: Config, data: RunData, known: Inputs | None = None) -> dict[str, Mapping[str, Any]]:
    """The digests of a configuration's prompts and of the local files of its models; ``known`` ones are reused."""
    found: dict[str, Mapping[str, Any]] = dict(known or {})
    source = config.data
    if not found:
        made = f"task {source.task.name}" if source.task is not None else str(source.prompts)
        found["training prompts"] = of_prompts(data.train, made)
        found["held-out prompts"] = of_prompts(data.all_heldout, source.heldout or made)
        found |= of_tools(tools_of(data.environment))
    models: dict[str, ModelConfig] = {"student": config.student}
    for name, teacher in config.named_teachers.items():
        models[f"teachers.{name}" if config.teachers else "teacher"] = teacher
    for name, model in models.items():
        if name in found or model.path is None:
            continue
        weights = not isinstance(model, TeacherConfig) or model.kind == "local"
        if digests := of_files(model.location, model.gguf_file, weights=weights):
            found[name] = digests
        base = adapter_base(model.location, ModelError)
        if base is not None and (digests := of_files(base, weights=weights)):
            found[f"{name} base model"] = digests
    return found


# Models


def note_to(progress: Tracker | None) -> Note:
    """A function that shows notes. All processes have the same notes; the first shows them."""
    if progress is None or os.environ.get("RANK", "0") != "0":
        return lambda note: None
    return progress.note


def build_models(
    config: Config,
    student: StudentConfig,
    data: RunData,
    progress: Tracker | None,
    examined: bool = True,
    trained: bool = False,
) -> tuple[LanguageModel, Teachers]:
    """Student and teachers; ``examined``: each pair and each server are examined first, from files where possible.
    ``trained``: the student is trained next, so that models may wait to be sharded.

    Raises:
        ConfigError: a pair that cannot be trained, if the run is to stop then.
        ModelError: missing files or devices.
    """
    named, note, seed = config.named_teachers, note_to(progress), config.train.seed
    examiners = {name: examiner_of(config, data, name, note) for name in named if examined}
    local = {name: t for name, t in named.items() if t.kind == "local"}
    servers = {name: served_teacher(t) for name, t in named.items() if t.kind == "served"}
    members: dict[str, Teacher] = {n: with_cache(named[n], server, note) for n, server in servers.items()}
    for name, server in servers.items() if examined else ():
        members[name].check_before_asking(partial(examiners[name].examine_server, server))
    absent = {name: absent_teacher(t) for name, t in named.items() if t.kind == "cache"}
    members |= {name: with_cache(named[name], teacher, note) for name, teacher in absent.items()}
    sides: dict[str, Side] = {n: teacher_side(named[n]) for n in members}  # those that can be read from files
    for here in (student, *local.values()):
        check_model(here)
    mine = file_side("student", student)
    sides |= {n: side for n, t in local.items() if (side := file_side("teacher", t)) is not None}
    readers = partial(readers_of_sides, route=config.route, several=bool(config.teachers))
    graded = [n for n, t in named.items() if t.kind != "self"] if examined else []
    late = [n for n in graded if mine is None or n not in sides]  # they need the loaded tokenizers
    if mine is not None:
        for name in [n for n in graded if n not in late]:
            examiners[name].examine_pair(mine, sides[name])
        if examined:
            check_longest(data.train, readers(mine, sides), config.rollout.max_new_tokens, note)
    in_shards = trained and _meet_to_shard(config, student)
    model = load(student, note, mine, seed, in_shards)
    loaded = {n: load(t, note, sides.get(n), in_shards=in_shards) for n, t in local.items()}
    if late:
        sides |= {name: _loaded_side("teacher", loaded[name]) for name in late if name in loaded}
        of_loaded = _loaded_side("student", model)
        for name in late:
            examiners[name].examine_pair(of_loaded, sides[name])
        check_longest(data.train, readers(of_loaded, sides), config.rollout.max_new_tokens, note)
    members |= {
        name: with_cache(local[name], LocalTeacher(found, batch_tokens=local[name].batch_tokens), note)
        for name, found in loaded.items()
    }
    for name, server in servers.items() if examined else ():
        members[name].check_before_asking(partial(examiners[name].compare, server, model))
    for name, teacher in named.items():
        if teacher.kind == "self":  # the initial student of the run, whichever is evaluated
            origin = model if student == config.student else load(config.student, note, seed=seed)
            members[name] = SelfTeacher(origin, teacher.decay if teacher.self == "ema" else 1.0)
    weights = {name: t.weight for name, t in config.teachers.items()} if config.mix else None
    return model, Teachers({name: members[name] for name in named}, config.mix, weights)


def _meet_to_shard(config: Config, student: StudentConfig) -> bool:
    """Whether the models of a run are to be sharded over its processes; then these meet, before models are loaded."""
    if config.train.sharding != "fsdp" or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    accelerator_of(config.train.precision, pick_device(student.device))
    return True


def examiner_of(config: Config, data: RunData, name: str, note: Note) -> Examiner:
    """The examiner of a teacher for a run."""
    prompts = graded_by(config, data, name)
    concerns = {term.name for term in config.objectives}
    concerns |= {str(value) for term in config.objectives for value in term.options.values()}
    if any_messages(data.train) if config.route is None else any_messages(prompts):
        concerns.add("messages")
    return Examiner(
        prompts,
        frozenset(concerns),
        stop=config.train.doctor == "stop",
        whose=f"teacher {name}: " if config.teachers else "",
        note=note,
        is_student=is_student(config, name),
    )


def is_student(config: Config, name: str) -> bool:
    """True if a teacher has the files of the student."""
    teacher = config.named_teachers[name]
    return teacher.kind == "self" or os.path.realpath(config.student.source) == os.path.realpath(
        teacher.source
    )


def served_teacher(config: TeacherConfig) -> ServedTeacher:
    """The teacher on a server."""
    assert config.served is not None
    return ServedTeacher(config.source, **_remote(config) | config.served.model_dump(exclude_none=True))


def absent_teacher(config: TeacherConfig) -> AbsentTeacher:
    """The teacher whose scores are only in a cache."""
    return AbsentTeacher(config.source, **_remote(config))


def _remote(config: TeacherConfig) -> dict[str, Any]:
    """Settings of a teacher whose weights are not loaded."""
    side = teacher_side(config)
    return {
        "roles": roles_of(config),
        "template_kwargs": config.template_kwargs,
        "rows": side.config.get("vocab_size"),
        "context": side.context,
        "device": pick_device(config.device),
    }


def with_cache(config: TeacherConfig, teacher: Teacher, note: Note = lambda note: None) -> Teacher:
    """The teacher with its cache, if the configuration names one."""
    return teacher if config.cache is None else cached_teacher(config.cache, teacher, note)


def cached_teacher(cache: CacheConfig, teacher: Teacher, note: Note) -> CachedTeacher:
    """The teacher with a cache."""
    cached = CachedTeacher(teacher, cache.path, top_k=cache.top_k, revision=cache.revision)
    if damage := cached.cache.damage:
        note(
            f"cache {cache.path}: {len(damage)} of its parts are damaged or cut short; what they held counts as "
            "missing; gold cache verify names them"
        )
    if not cached.complete:
        note(f"cache {cache.path}: the teacher is not asked; evaluations leave out its scores of the student")
    return cached


def check_model(model: ModelConfig) -> None:
    """Checks that the files and the device of a model exist."""
    check_files(model.location, gguf_file=model.gguf_file)
    try:
        pick_device(model.device)
        check_attention(model.attn_implementation, model.trust_remote_code)
        if isinstance(model, TeacherConfig) and model.device_map and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ModelError(
                "device_map spreads a teacher over the GPUs of one process: leave it out with several"
            )
        if model.quantization is not None:
            quantization.check_installed(model.quantization)
        if isinstance(model, StudentConfig) and model.lora is not None:
            adapters.check_installed()
            if adapter_base(model.location, ModelError) is not None:
                raise ModelError(
                    "it is a folder of adapters, which are trained further: leave student.lora out"
                )
    except ModelError as error:
        raise ModelError(f"model {model.location}: {error}") from error


def load(
    model: ModelConfig,
    note: Note = lambda note: None,
    side: Side | None = None,
    seed: int = 0,
    in_shards: bool = False,
) -> LanguageModel:
    """A model with its weights, and a student's new adapters, drawn with ``seed``; notes if its tokenizer differs from
    that of its files, ``side``. ``in_shards``: as for ``load_model``."""
    adapted = isinstance(model, StudentConfig) and model.lora is not None
    role = "student" if isinstance(model, StudentConfig) else "teacher"
    with doing(f"loading {role} {model.location}{_size(model)}"):
        loaded = load_model(
            model.location,
            gguf_file=model.gguf_file,
            dtype=model.dtype,
            device=model.device,
            device_map=model.device_map if isinstance(model, TeacherConfig) else None,
            attn_implementation=model.attn_implementation,
            quantization=model.quantization,
            roles=roles_of(model),
            trust_remote_code=model.trust_remote_code,
            template_kwargs=model.template_kwargs,
            in_shards=in_shards and not adapted,
        )
    if side is not None:
        for difference in differences(
            side.vocabulary, loaded.vocabulary.without_markers(), texts=SAMPLE_TEXTS
        ):
            note(
                f"model {loaded.name}: its tokenizer as loaded (here), which is used, differs from its file (there): "
                f"{difference}"
            )
    if adapters.is_adapted(loaded.lm):
        note(f"model {loaded.name}: {adapters.describe(loaded.lm)}")
    if isinstance(model, StudentConfig) and model.lora is not None:
        base = str(model.source)
        return adapters.add_adapters(loaded, **model.lora.model_dump(), seed=seed, base=base)
    return loaded


def _size(model: ModelConfig) -> str:
    """The size of a folder's weights, in brackets; "" where they are not in a folder of this machine."""
    folder = Path(model.path or "")
    files = [folder / model.gguf_file] if model.gguf_file else [*folder.glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return f" ({size / 1e9:.1f} GB)" if size >= 5e7 else f" ({size / 1e6:.1f} MB)" if size else ""


def _loaded_side(role: str, model: LanguageModel) -> Side:
    config = model.lm.config.get_text_config().to_dict()
    return Side(
        role, model.vocabulary.without_markers(), model.tokenizer, config=config, rendering=model.rendering
    )


def file_side(role: str, model: ModelConfig) -> Side | None:
    """A side from the files of a model folder; None if it has no tokenizer.json."""
    folder = model.location
    base = None if has_tokenizer(folder) else adapter_base(folder, ModelError)
    there = (Path(base or folder) / "tokenizer.json").is_file()
    return read_side(role, model.location, roles_of(model), rendering_of(model)) if there else None


def teacher_side(teacher: TeacherConfig) -> Side:
    """The side of a teacher whose weights are not loaded."""
    return read_side("teacher", teacher.source, roles_of(teacher), rendering_of(teacher))


def reader_sides(config: Config) -> dict[str, tuple[Side, str | None]]:
    """The sides of a run's student and teachers, from their files, each with the route of the prompts that it reads;
    None: all.

    Raises:
        VocabularyError: a tokenizer that cannot be read.
    """
    found: dict[str, tuple[Side, str | None]] = {}
    found["student"] = (
        read_side("student", config.student.source, roles_of(config.student), rendering_of(config.student)),
        None,
    )
    for name, teacher in config.named_teachers.items():
        model: ModelConfig = config.student if teacher.kind == "self" else teacher
        side = read_side("teacher", model.source, roles_of(model), rendering_of(model))
        found[f"teacher {name}" if config.teachers else "teacher"] = side, name if config.route else None
    return found


def roles_of(model: ModelConfig) -> Roles:
    """The special tokens that a configuration sets for a model."""
    return Roles(model.roles.stop, model.roles.bos, model.roles.pad)


def rendering_of(model: ModelConfig) -> Rendering:
    """The arguments of a model's chat template; with a cache, the date is the cache's."""
    cache = model.cache if isinstance(model, TeacherConfig) else None
    origin = find_origin(cache.path) if cache is not None else None
    day = date.fromisoformat(origin.date) if origin is not None and origin.date else None
    return Rendering(dict(model.template_kwargs), day)


SAMPLE_TEXTS = (
    *("Hello, world!", " leading space", "1234 + 5 = 1239"),
    *("déjà vu — naïve", "a\n\n  b\tc", "漢字かな 😀", "▁x"),
)
"""Texts on which two tokenizers are compared."""
