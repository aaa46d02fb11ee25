"""On-policy distillation between language models that do not share a tokenizer.

The public names are defined in the modules below and loaded on first use, so that `import gold` is cheap: it loads
neither torch, transformers nor numba. No public name equals the name of a module: `gold.align` is always the package,
`gold.evaluate` always the module.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gold.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    GoldError,
    ModelError,
    TeacherError,
    TrainingError,
    VocabularyError,
)
from gold.version import __version__

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the application decides what is shown

if TYPE_CHECKING:
    from gold.align.chunks import Alignment, align_tokens
    from gold.config import Config
    from gold.data import Prompt, load_prompts
    from gold.models.load import load_model
    from gold.rollout.vllm import VLLMEngine
    from gold.tasks import load_task
    from gold.teachers import CachedTeacher, LocalTeacher, SelfTeacher, ServedTeacher, Teachers
    from gold.tokenize.vocabulary import TokenizedText, Vocabulary
    from gold.train.loop import distill
    from gold.train.recipe import Recipe, Term

__all__ = [
    "Alignment",
    "CachedTeacher",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "EngineError",
    "GoldError",
    "LocalTeacher",
    "ModelError",
    "Prompt",
    "Recipe",
    "SelfTeacher",
    "ServedTeacher",
    "TeacherError",
    "Teachers",
    "Term",
    "TokenizedText",
    "TrainingError",
    "VLLMEngine",
    "Vocabulary",
    "VocabularyError",
    "__version__",
    "align_tokens",
    "distill",
    "load_model",
    "load_prompts",
    "load_task",
]

_MODULE_OF = {
    "Alignment": "gold.align.chunks",
    "CachedTeacher": "gold.teachers",
    "Config": "gold.config",
    "LocalTeacher": "gold.teachers",
    "Prompt": "gold.data",
    "Recipe": "gold.train.recipe",
    "SelfTeacher": "gold.teachers",
    "ServedTeacher": "gold.teachers",
    "TokenizedText": "gold.tokenize.vocabulary",
    "Teachers": "gold.teachers",
    "Term": "gold.train.recipe",
    "VLLMEngine": "gold.rollout.vllm",
    "Vocabulary": "gold.tokenize.vocabulary",
    "align_tokens": "gold.align.chunks",
    "distill": "gold.train.loop",
    "load_model": "gold.models.load",
    "load_prompts": "gold.data",
    "load_task": "gold.tasks",
}


def __getattr__(name: str) -> Any:
    """The public name, imported from its module at first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gold' has no attribute {name!r}")
    found = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
