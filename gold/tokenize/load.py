"""Loads a tokenizer and the roles of its special tokens from folders, files, objects or Hub ids."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gold.errors import VocabularyError
from gold.files import adapter_base, open_file, read_bytes, read_json, read_json_object, read_text
from gold.hub_names import IS_ID, fault_line, split_revision
from gold.tokenize.components import check_growth, leading_bos
from gold.tokenize.convert.gguf import gguf_tokenizer, read_metadata, role_ids
from gold.tokenize.convert.older_files import FILES, older_tokenizer
from gold.tokenize.convert.sentencepiece import read_model, tokenizer_of
from gold.tokenize.convert.tiktoken import (
    encoding_tokenizer,
    is_encoding,
    is_tekken,
    named_encoding,
    tekken_roles,
    tekken_tokenizer,
)
from gold.tokenize.families import MOST_IDS
from gold.tokenize.foreign import foreign
from gold.tokenize.roles import Roles, default_template, id_of_role, token_content, turn_ends

_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_HUB_FILES = ("tokenizer.json", "tekken.json", *_SETTINGS, *FILES)
# A tokenizer that fails on every text fails here, where the source is known.
_PROBE = "Hello, wörld!  1234 + aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n"
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf")
# Tokens that end a text or an answer in OpenAI's encodings, which name no roles.
_TIKTOKEN_ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")


@dataclass(frozen=True)
class Source:
    """A tokenizer with the roles and the chat template that its source defines."""

    tokenizer: Tokenizer
    name: str
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None


def open_source(source: Any, stop_ids: Iterable[int] = (), roles: Roles | None = None) -> Source:
    """The tokenizer of a path, a Hub id or an object, and its roles.

    A path is a folder, a tokenizer.json, a GGUF file, a tekken.json, or a SentencePiece model; `tiktoken:NAME` is an
    encoding of that library. Objects are a `tokenizers.Tokenizer`, a fast Hugging Face tokenizer, a tiktoken encoding
    and a mistral_common tokenizer.

    The stop ids are the source's EOS, the ids in generation_config.json, the token that its chat template writes after
    an answer, and the given `stop_ids`. A role in `roles` replaces everything found for that role.

    Raises: VocabularyError if there is none, if it cannot be loaded, or if it lacks a token named in `roles`.
    """
    found = _open(source)
    try:
        check_growth(found.tokenizer)
    except VocabularyError as error:
        raise VocabularyError(f"{found.name}: {error}") from None
    with foreign(found.name), suppress(Exception):  # unknown characters may raise an error
        found.tokenizer.encode(_PROBE)

    def index(role: str, token: str) -> int:
        return id_of_role(found.tokenizer, role, token, found.name)

    roles = roles or Roles()
    stops = [*found.stop_ids, *stop_ids] if roles.stop is None else [index("stop", t) for t in roles.stop]
    bos = found.bos_id if roles.bos is None else index("bos", roles.bos)
    pad = found.pad_id if roles.pad is None else index("pad", roles.pad)
    if (bad := _no_id([*stops, *(i for i in (bos, pad) if i is not None)])) is not None:
        raise VocabularyError(
            f"{found.name}: the id of a stop, BOS or pad token is {bad}, which no token has"
        )
    return replace(found, stop_ids=tuple(dict.fromkeys(int(i) for i in stops)), bos_id=bos, pad_id=pad)


def _no_id(ids: Iterable[Any]) -> str | None:
    """The first value that cannot be a token id, for display; None if all can."""

    def is_id(value: Any) -> bool:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        return whole and 0 <= int(value) < MOST_IDS

    return next((repr(value)[:60] for value in ids if not is_id(value)), None)


def _open(source: Any) -> Source:
    if isinstance(source, Tokenizer):
        return Source(source, "tokenizers.Tokenizer", bos_id=leading_bos(source))
    if isinstance(source, str | os.PathLike):
        return _from_name(os.fspath(source))
    if isinstance(backend := getattr(source, "backend_tokenizer", None), Tokenizer):
        return _from_hugging_face(source, backend)
    if is_encoding(source):
        return _from_encoding(source, f"tiktoken {getattr(source, 'name', 'encoding')}")
    if (found := _from_mistral(source)) is not None:
        return found
    raise VocabularyError(
        f"a {type(source).__name__} has no tokenizers.Tokenizer behind it; give a folder, a tokenizer.json, a Hub id, "
        "or a fast Hugging Face tokenizer"
    )


def _from_name(name: str) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _from_file(path)
    scheme, colon, encoding = name.partition(":")
    if colon and scheme == "tiktoken":
        return replace(_open(named_encoding(encoding)), name=name)
    if not IS_ID.fullmatch(name) or path.suffix in (".json", ".gguf", ".model"):
        raise VocabularyError(f"no tokenizer at {name}: no such file or folder")
    return _from_folder(_from_hub(name))


def _from_hub(name: str) -> Path:
    repository, revision = split_revision(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise VocabularyError(
            f"no such file or folder: {name}; to read it as a Hub id, pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the Hub client raises many types
        raise VocabularyError(f"no tokenizer {name!r}: {fault_line(repository, revision, error)}") from None


def has_tokenizer(folder: str | Path) -> bool:
    """True for a folder with a tokenizer's files, in any format but GGUF."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tekken.json", *FILES[:-1]))


def _from_folder(folder: Path) -> Source:
    if not has_tokenizer(folder) and (base := adapter_base(folder, VocabularyError)) is not None:
        return _from_name(base)  # peft's own files include no tokenizer
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    found = _in_folder(folder, config)
    file = folder / "chat_template.jinja"
    template = (
        read_text(file, VocabularyError) if file.exists() else default_template(config.get("chat_template"))
    )
    named = _as_list(generation.get("eos_token_id"))
    if (bad := _no_id(named)) is not None:
        file = folder / "generation_config.json"
        raise VocabularyError(f"{file}: eos_token_id has {bad}; expected an id or a list of ids")
    ids = {role: _id_of(found.tokenizer, config.get(f"{role}_token")) for role in ("eos", "bos", "pad")}
    ends = turn_ends(template or found.chat_template, config, found.tokenizer)
    return Source(
        found.tokenizer,
        str(folder),
        stop_ids=_distinct([ids["eos"], *named, *found.stop_ids, *ends]),
        bos_id=found.bos_id if ids["bos"] is None else ids["bos"],
        pad_id=found.pad_id if ids["pad"] is None else ids["pad"],
        chat_template=template or found.chat_template,
    )


def _in_folder(folder: Path, config: Mapping[str, Any]) -> Source:
    """The tokenizer from the newest file format in the folder, with the roles that this file defines."""
    for name in ("tokenizer.json", "tekken.json"):
        if (folder / name).exists():
            return _from_file(folder / name)
    files = sorted(folder.glob("*.gguf"))
    parts = [file for file in files if (part := _PART.search(file.name)) is None or part[1] == "00001"]
    if len(parts) == 1:
        return _from_file(parts[0])
    if parts:
        raise VocabularyError(
            f"{folder} has {len(parts)} GGUF files ({', '.join(file.name for file in parts[:3])}); name one of them"
        )
    older = older_tokenizer(folder, config)
    if older is None:
        raise VocabularyError(
            f"no tokenizer.json in {folder}, nor tekken.json, a GGUF file, tokenizer.model, vocab.json with "
            "merges.txt, or vocab.txt; save one there with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
        )
    return _with_ids(older[0], str(folder), older[1])


def _from_file(path: Path) -> Source:
    name = str(path)
    with open_file(path, VocabularyError) as stream:
        head = stream.read(4)
    try:
        if head == b"GGUF" or path.suffix == ".gguf":
            return _from_gguf(path)
        if ".model" in path.suffixes:
            pieces, roles = read_model(read_bytes(path, VocabularyError), name)
            with foreign(name):
                return _with_ids(tokenizer_of(pieces), name, roles)
        if "tekken" in path.name and is_tekken(content := read_json(path, VocabularyError)):
            tokenizer = tekken_tokenizer(content)
            return _with_ids(tokenizer, name, tekken_roles(tokenizer))
        tokenizer = _read_tokenizer(path)
    except VocabularyError as error:
        raise VocabularyError(str(error) if name in str(error) else f"{name}: {error}") from None
    return Source(tokenizer, name, bos_id=leading_bos(tokenizer))


def _from_gguf(path: Path) -> Source:
    metadata = read_metadata(path)
    with foreign(str(path)):
        tokenizer, ids = _whole(gguf_tokenizer(metadata)), role_ids(metadata)
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    tokens = {f"{role}_token": tokenizer.id_to_token(i) or "" for role, i in ids.items()}
    stops = [ids.get(role) for role in ("eos", "eot", "eom")]
    # BERT ends sequences with its separator.
    stops = stops if any(i is not None for i in stops) else [ids.get("seperator")]
    return Source(
        tokenizer,
        str(path),
        _distinct([*stops, *turn_ends(template, tokens, tokenizer)]),
        ids.get("bos"),
        ids.get("padding"),
        template,
    )


def _with_ids(tokenizer: Tokenizer, name: str, ids: Mapping[str, int]) -> Source:
    return Source(tokenizer, name, _distinct([ids.get("eos")]), ids.get("bos"), ids.get("pad"))


def _from_encoding(encoding: Any, name: str) -> Source:
    try:
        tokenizer = encoding_tokenizer(encoding)
    except VocabularyError as error:
        raise VocabularyError(f"{name}: {error}") from None
    return Source(tokenizer, name, _distinct(encoding._special_tokens.get(token) for token in _TIKTOKEN_ENDS))


def _from_mistral(source: Any) -> Source | None:
    """The tokenizer of a mistral_common object, or of the transformers tokenizer around one; None for others."""
    around = [source]
    for _ in range(3):
        around.append(
            getattr(around[-1], "instruct_tokenizer", None) or getattr(around[-1], "tokenizer", None)
        )
    for inner in around:
        name = type(inner).__name__
        model: Any = getattr(inner, "_model", None)
        if is_encoding(model) and hasattr(inner, "_all_special_tokens"):
            special = {str(t["token_str"]): int(t["rank"]) for t in inner._all_special_tokens}
            tokenizer = encoding_tokenizer(model, special)
            return _with_ids(tokenizer, name, tekken_roles(tokenizer))
        if hasattr(model, "serialized_model_proto"):
            pieces, roles = read_model(model.serialized_model_proto(), name)
            return _with_ids(tokenizer_of(pieces), name, roles)
    return None


def _from_hugging_face(source: Any, backend: Tokenizer) -> Source:
    template = default_template(getattr(source, "chat_template", None))
    tokens = getattr(source, "special_tokens_map", {})
    return Source(
        backend,
        str(getattr(source, "name_or_path", "") or type(source).__name__),
        _distinct([*_as_list(source.eos_token_id), *turn_ends(template, tokens, backend)]),
        source.bos_token_id,
        source.pad_token_id,
        template,
    )


def _read_tokenizer(path: Path) -> Tokenizer:
    data = read_bytes(path, VocabularyError)
    try:
        with foreign(str(path), (Exception,)):
            return _whole(Tokenizer.from_buffer(data))
    except VocabularyError as error:
        reason = str(error).removeprefix(f"{path}: ")[:200]
    content = read_json(path, VocabularyError)  # reports what a file is if it is not JSON
    if not isinstance(content, dict) or "model" not in content:
        reason = 'it is JSON, but has no "model"; give a tokenizer.json'
    raise VocabularyError(f"{path} is no tokenizer that tokenizers can read: {reason}")


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding, which a file may keep from earlier use."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, VocabularyError) if path.exists() else {}


def _id_of(tokenizer: Tokenizer, token: Any) -> int | None:
    content = token_content(token)
    index: int | None = None if content is None else tokenizer.token_to_id(content)
    return index


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index for index in ids if index is not None))
