"""The model card of a trained student: the README.md of its folder, with the metadata that the Hub reads."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gold.errors import GoldError
from gold.files import adapter_base, read_json
from gold.hub_names import split_revision
from gold.inspect.charts import number
from gold.inspect.series import held_out, is_number, named
from gold.train.run_folder import RunFolder, config_text

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Keys that say where and how a run went, not what it computed; some name machines of their owner.
_PRIVATE = {"output", "push_to_hub", "device", "url", "key_env", "folder", "python", "arguments", "trackers"}


def model_card(run: RunFolder, *, adapter: bool = False, note: str = "") -> str:
    """The card of a run's student, or of its ``adapter`` alone, as Markdown with YAML metadata.

    It names the models, the data by digest, the objective, the measures before and after, and how to repeat the run.
    ``note``: a sentence on how the written weights relate to those that were measured.
    """
    from huggingface_hub import ModelCardData

    base, teachers = _student(run.config), _teachers(run.config)
    licences = {name: _licence(name) for name in (base, *teachers)}
    metadata = ModelCardData(
        base_model=split_revision(base)[0] if _is_hub_id(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if _is_hub_id(base) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "on-policy-distillation", "gold", *(["lora"] if adapter else [])],
        **licences[base],
    )
    what = "An adapter for" if adapter else "A fine-tuned"
    learned = (
        f"from {' and '.join(f'`{_shown(each)}`' for each in teachers)}" if teachers else "without a teacher"
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {_shown(base)}, distilled",
        f"{what} `{_shown(base)}`, trained {learned} with gold on its own completions (on-policy distillation).",
        _use(adapter),
        f"## Measures\n\n{_measures(run)}" + (f"\n\n{note}" if note else ""),
        f"## Training\n\n{_training(run, base, teachers)}",
        f"## Repeating it\n\n{_repeating(run)}",
        f"## Licence\n\n{_licences(base, licences)}",
    ]
    return "\n\n".join(parts) + "\n"


def _use(adapter: bool) -> str:
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    library = "peft" if adapter else "transformers"
    return (
        f'```python\nfrom {library} import {kind}\n\nmodel = {kind}.from_pretrained("…")  # this folder\n```'
    )


def _measures(run: RunFolder) -> str:
    evals = run.records("eval")
    if not evals:
        return "No held-out prompts were evaluated."
    shown = [evals[0], *evals[1:][-1:]]
    head = ["held out", *(f"step {record['step']:,}" for record in shown)]
    rows = [[named(s.name), *(_cell(record, s.name) for record in shown)] for s in held_out(shown)]
    return f"{_table(head, rows)}\n\nIn brackets 95 % intervals over the prompts."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _cell(record: Mapping[str, Any], name: str) -> str:
    value, low, high = (record.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if not is_number(value):
        return "–"
    said = number(float(value))  # type: ignore[arg-type]
    if is_number(low) and is_number(high):
        said += f" ({number(float(low))} – {number(float(high))})"  # type: ignore[arg-type]
    return said


def _training(run: RunFolder, base: str, teachers: Sequence[str]) -> str:
    config, recipe = run.config, run.config.get("recipe") or {}
    train, rollout, rates = (recipe or config.get(part) or {} for part in ("train", "rollout", "optimizer"))
    terms = recipe.get("objectives") or config.get("objectives") or []
    steps = max((int(record["step"]) for record in run.records("train")), default=0)
    each = f"{train.get('prompts_per_step')} prompts × {rollout.get('num_generations')} completions"
    length = f"up to {rollout.get('max_new_tokens')} tokens, temperature {rollout.get('temperature')}"
    rate = f"{rates.get('lr')}, {rates.get('schedule')}, {rates.get('warmup_steps')} steps of warm-up"
    rows = {
        "student before": f"`{_shown(base)}`",
        "teacher": ", ".join(f"`{_shown(teacher)}`" for teacher in teachers) or "none",
        **{name: _data(entry) for name, entry in run.inputs(True).items() if name.endswith(" prompts")},
        "objective": " + ".join(map(_term, terms)),
        "steps": f"{steps:,}, of {each}",
        "completions": length,
        "learning rate": rate,
    }
    student = config.get("student")
    if lora := student.get("lora") if isinstance(student, Mapping) else None:
        rows["adapters"] = f"rank {lora.get('rank')}, alpha {lora.get('alpha')}"
    return _table(["", ""], rows.items())


def _data(entry: Mapping[str, Any]) -> str:
    count = entry.get("count")
    digest = str(entry["digests"].get("content", ""))[:16]
    many = f"{count:,} prompts, " if isinstance(count, int) else ""
    return f"`{_shown(entry['from'])}`, {many}SHA-256 of the content begins with `{digest}`"


def _term(term: Mapping[str, Any]) -> str:
    weight = term.get("weight", 1.0)
    options = ", ".join(f"{k} {v}" for k, v in term.items() if k not in ("name", "weight") and v is not None)
    return (
        f"{f'{weight:g} × ' if weight != 1 else ''}`{term.get('name')}`{f' ({options})' if options else ''}"
    )


def _repeating(run: RunFolder) -> str:
    file = run.path / "environment.json"
    found = read_json(file, GoldError) if file.exists() else {}
    program, *arguments = map(str, found.get("command") or ["gold"])
    command = [os.path.basename(program), *map(_shown, arguments)]
    versions = ", ".join(f"{name} {v}" for name, v in found.get("versions", {}).items() if v)
    seed = (run.config.get("recipe") or run.config.get("train") or {}).get("seed")
    return "\n\n".join(
        [
            f"```\n{shlex.join(command)}\n```",
            f"with seed {seed}, {versions}; {'; '.join(found.get('devices', []))}. The whole configuration, without "
            "the places where it ran:",
            f"```yaml\n{config_text(_public(run.config)).strip()}\n```",
        ]
    )


def _public(value: Any) -> Any:
    """A configuration without keys that are null, empty or private; local paths by their last part."""
    if isinstance(value, Mapping):
        kept = {key: _public(entry) for key, entry in value.items() if key not in _PRIVATE}
        return {key: entry for key, entry in kept.items() if entry not in (None, {}, [])}
    if isinstance(value, list | tuple):
        return [_public(entry) for entry in value]
    return _shown(value) if isinstance(value, str) and os.path.isabs(value) else value


# Models


def _student(config: Mapping[str, Any]) -> str:
    return _named(config.get("student"))


def _teachers(config: Mapping[str, Any]) -> list[str]:
    """The names of the teachers, each once; a student that teaches itself is called so."""
    given = [config.get("teacher"), *(config.get("teachers") or {}).values()]
    if isinstance(given[0], Mapping) and "recipe" in config:  # of a run from Python, by name
        given = [name for key, name in given[0].items() if key != "mix"]
    return list(dict.fromkeys(_named(each) for each in given if each is not None))


def _named(model: Any) -> str:
    """A model's location with its revision, or its name."""
    if not isinstance(model, Mapping):
        return str(model)
    if model.get("self"):
        return f"itself ({model['self']})"
    revision = model.get("revision")
    return f"{model.get('path')}@{revision}" if revision else str(model.get("path"))


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(split_revision(name)[0]) is not None and not Path(name).exists()


def _shown(name: str) -> str:
    """A model's or file's name; of an absolute path the last part."""
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(os.path.expanduser(name)) else name


def _licence(source: str) -> dict[str, Any]:
    """The licence, its name and its link as a model's own card gives them; empty where it has no card or names none."""
    from huggingface_hub import ModelCard

    try:
        if (file := _card_of(source)) is None:
            return {}
        data = ModelCard.load(file).data.to_dict()
    except Exception as error:  # a card is written by people
        logger.warning("the model card of %s cannot be read, its licence is left out: %s", source, error)
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: data[key] for key in keys if isinstance(data.get(key), str)}


def _card_of(source: str) -> Path | None:
    """The card in a model's folder, or that of a Hub id if it is there or can be fetched."""
    folder = Path(os.path.expanduser(source))
    folder = folder.parent if folder.is_file() else folder
    if folder.is_dir():
        if (file := folder / "README.md").is_file():
            return file
        base = adapter_base(folder, GoldError)
        return None if base is None else _card_of(base)
    if not _is_hub_id(source):
        return None
    from huggingface_hub import hf_hub_download

    name, revision = split_revision(source)
    return Path(hf_hub_download(name, "README.md", revision=revision, etag_timeout=5))


def _licences(base: str, licences: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        f"- {'base model' if name == base else 'teacher'} `{_shown(name)}`: {_licence_text(found)}"
        for name, found in licences.items()
        if not name.startswith("itself (")
    ]
    return "\n".join(
        [
            "What the cards of the models say:",
            "",
            *lines,
            "",
            "The terms of the base model hold for this one; those of a teacher may restrict what its scores are used "
            "for. Read them before you share this model.",
        ]
    )


def _licence_text(found: Mapping[str, str]) -> str:
    if "license" not in found:
        return "no licence is named"
    name = found.get("license_name") or found["license"]
    return f"[{name}]({found['license_link']})" if "license_link" in found else name
