"""From a name to a live tokenizer and the roles of its special tokens: folders, files, objects, Hub ids."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gold.align.spelling import leading_event
from gold.errors import VocabularyError

_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
# How the chat templates of the families that we know end an assistant's turn.
_TURN_ENDS = (
    "<|im_end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|return|>",
    "<|end_of_turn|>",
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A live tokenizer and the roles of its special tokens, as far as the source tells them."""

    tokenizer: Tokenizer
    name: str
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None


def open_source(source: Any) -> Source:
    """The tokenizer that a path, a Hub id, a `tokenizers.Tokenizer` or a Hugging Face tokenizer object stands for.

    Raises: VocabularyError if there is none, or if it cannot be read.
    """
    if isinstance(source, Tokenizer):
        return Source(source, "tokenizers.Tokenizer", bos_id=leading_event(source))
    if isinstance(source, str | os.PathLike):
        return _from_name(os.fspath(source))
    backend = getattr(source, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return _from_object(source, backend)
    raise VocabularyError(
        f"a {type(source).__name__} has no tokenizers.Tokenizer behind it; give a folder, a tokenizer.json, a Hub id, "
        "or a fast Hugging Face tokenizer"
    )


def _from_name(name: str) -> Source:
    path = Path(name)
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        tokenizer = _read_tokenizer(path)
        return Source(tokenizer, name, bos_id=leading_event(tokenizer))
    if not _HUB_ID.fullmatch(name) or name.endswith(".json"):
        raise VocabularyError(f"no tokenizer at {name}: no such file or folder")
    return _from_folder(_from_hub(name))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise VocabularyError(
            f"no such file or folder: {name}; to read it as a Hub id, pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the Hub's client has many, and for all of them the name is what matters
        reason = str(error).strip().splitlines()
        raise VocabularyError(
            f"no tokenizer {name!r}: it is no file or folder, and the Hub answers: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from None


def _from_folder(folder: Path) -> Source:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise VocabularyError(
            f"no tokenizer.json in {folder}; save one there with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
        )
    tokenizer = _read_tokenizer(file)
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    template = folder / "chat_template.jinja"
    templates = [config.get("chat_template"), template.read_text("utf-8") if template.exists() else None]
    stops = [_id_of(tokenizer, config.get("eos_token")), *_as_list(generation.get("eos_token_id"))]
    bos = _id_of(tokenizer, config.get("bos_token"))
    return Source(
        tokenizer,
        str(folder),
        stop_ids=_distinct([*stops, *_turn_ends(tokenizer, templates)]),
        bos_id=leading_event(tokenizer) if bos is None else bos,
        pad_id=_id_of(tokenizer, config.get("pad_token")),
    )


def _from_object(source: Any, backend: Tokenizer) -> Source:
    stops = [*_as_list(source.eos_token_id), *_turn_ends(backend, [getattr(source, "chat_template", None)])]
    return Source(
        backend,
        str(getattr(source, "name_or_path", "") or type(source).__name__),
        stop_ids=_distinct(stops),
        bos_id=source.bos_token_id,
        pad_id=source.pad_token_id,
    )


def _turn_ends(tokenizer: Tokenizer, templates: Iterable[Any]) -> list[int]:
    text = json.dumps(list(templates), ensure_ascii=False)
    added = tokenizer.get_added_tokens_decoder().items()
    return sorted(index for index, token in added if token.content in _TURN_ENDS and token.content in text)


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise VocabularyError(f"{path} is no tokenizer that tokenizers can read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise VocabularyError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise VocabularyError(f"{path} holds no JSON object")
    return content


def _id_of(tokenizer: Tokenizer, token: Any) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    index: int | None = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return index


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index for index in ids if index is not None))
