"""Tasks of lm-eval, EleutherAI's evaluation harness, run on a loaded model. Only this module knows lm-eval."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gold.errors import ConfigError, DataError, ModelError
from gold.files import one_line
from gold.models.language_model import LanguageModel

Scores = dict[str, dict[str, dict[str, float | None]]]
"""By task and metric (``exact_match, strict-match``) its ``value`` and its ``stderr``, None where it has none."""


def check_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """lm-eval's list of tasks, for ``run_tasks``; ``folder`` holds further ones, as YAML files.

    Raises:
        ConfigError: lm-eval is not installed, no task is named, the folder does not exist, or a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval: pip install 'gold-distill[lm-eval]'")
    if not names:
        raise ConfigError("--tasks names no task; give some of lm-eval's, such as gsm8k,ifeval")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--task-path {folder}: there is no such folder")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = None if folder is None else str(folder)
    known = TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and not all(known.match_tasks([name]) for name in names):
        known = TaskManager(include_path=path)  # reads its thousands of files
    if unknown := [name for name in names if not known.match_tasks([name])]:
        where = "" if folder is None else f" or in {folder}"
        raise ConfigError(f"--tasks: {unknown[0]} is no task of lm-eval{where}; lm-eval ls tasks lists them")
    return known


def run_tasks(
    model: LanguageModel,
    names: Sequence[str],
    known: Any,
    *,
    batch_size: int,
    limit: int | None = None,
    chat: bool = False,
) -> Scores:
    """The scores of a model on tasks, as lm-eval computes them: with the task's own few-shot examples and decoding.

    ``known``: the answer of ``check_tasks``. ``limit``: only so many documents of each. ``chat``: texts go through the
    chat template.

    Raises:
        DataError: a task cannot be run, for example because its data cannot be fetched.
        ModelError: ``chat`` for a model without a chat template.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if chat and not getattr(model.tokenizer, "chat_template", None):
        raise ModelError(f"model {model.name}: it has no chat template: leave --apply-chat-template out")
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model.lm, tokenizer=model.tokenizer, batch_size=batch_size),
            tasks=list(names),
            task_manager=known,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )
    except Exception as error:
        raise DataError(
            f"lm-eval cannot run {', '.join(names)} on {model.name}: {one_line(error)}"
        ) from error
    return {task: dict(_metrics(result)) for task, result in found["results"].items()}


def _metrics(result: dict[str, Any]) -> Iterable[tuple[str, dict[str, float | None]]]:
    """The metrics of a task: ``exact_match,strict-match`` has its error under ``exact_match_stderr,strict-match``."""
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric}, {filtered}"
        yield (
            name,
            {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None},
        )
