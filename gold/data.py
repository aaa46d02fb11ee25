"""Prompts: loading from JSON Lines, splitting by content."""

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from gold.errors import ConfigError, DataError, did_you_mean
from gold.files import json_value, open_file

Message = dict[str, str]

LINE_KEYS = ("prompt", "messages", "completion", "id", "reference", "teacher_context")
MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """A prompt for a completion: a plain text, or the messages of a conversation; exactly one of the two.

    `key` is unique within its file and does not change when other lines are added or removed. `completion` is a given
    answer, for off-policy training; `reference` is any data for the verifier. `teacher_context` is added for teachers
    only: a text, or, before messages, messages. `route` names the prompt's teacher, if there are several. `weight`: how
    often it is trained on, relative to the others; see `PromptOrder`.

    Raises:
        DataError: neither or both of `text` and `messages`, an empty one, an unknown role, text that UTF-8
            cannot encode, messages as the context of a plain text, a weight that is negative or infinite.
    """

    key: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    completion: str | None = None
    reference: Any = None
    teacher_context: str | tuple[Message, ...] | None = None
    route: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise DataError("a prompt needs exactly one of a text and messages")
        if self.text is not None:
            _check_text("prompt", self.text)
        if self.messages is not None:
            _check_messages(self.messages)
        if self.completion is not None:
            _check_text("completion", self.completion, blank_is_text=True)
        if isinstance(self.teacher_context, tuple):
            if self.messages is None:
                raise DataError(
                    '"teacher_context" is a list, and the prompt is a plain text; give it as a string'
                )
            _check_turns("teacher_context", self.teacher_context)
        elif self.teacher_context is not None:
            _check_text("teacher_context", self.teacher_context)
        if not 0.0 <= self.weight < math.inf:
            raise DataError(f"its weight is {self.weight}; expected a number from 0")

    @property
    def for_teacher(self) -> "Prompt":
        """The prompt for teachers: with its teacher context, if it has one.

        The context of a plain text directly precedes it. With messages, a text is inserted before the content of the
        last user message (without one, the last message), separated by a blank line. Messages are inserted before all
        others; only a system or developer message at the beginning of the conversation stays first, merged with one of
        the same role at the beginning of the context.
        """
        context = self.teacher_context
        if context is None:
            return self
        if self.messages is None:
            return replace(self, text=f"{context}{self.text}", teacher_context=None)
        turns = list(self.messages)
        if isinstance(context, str):
            users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
            at = users[-1] if users else len(turns) - 1
            turns[at] = {**turns[at], "content": f"{context}\n\n{turns[at]['content']}"}
            return replace(self, messages=tuple(turns), teacher_context=None)
        extra, first = list(context), turns[0]
        head = [turns.pop(0)] if first["role"] in ("system", "developer") and len(turns) > 1 else []
        if head and extra[0]["role"] == first["role"]:
            head = [{**first, "content": f"{first['content']}\n\n{extra.pop(0)['content']}"}]
        return replace(self, messages=(*head, *extra, *turns), teacher_context=None)


def content_hash(prompt: Prompt) -> str:
    """The SHA-256 (hexadecimal) of the part of a prompt that models read, without its answers and key."""
    if prompt.messages is None:
        content = _quoted(prompt.text or "")
    else:
        content = ", ".join(f"[{_quoted(m['role'])}, {_quoted(m['content'])}]" for m in prompt.messages)
        content = f"[{content}]"
    return hashlib.sha256(content.encode("ascii")).hexdigest()


_quoted = encode_basestring_ascii
_encode = json.JSONEncoder(default=repr, sort_keys=True).encode


def row_of(prompt: Prompt) -> bytes:
    """A prompt as a line of JSON: the list of its fields, a weight other than 1 last."""
    p, weight = prompt, "" if prompt.weight == 1.0 else f", {_encode(prompt.weight)}"
    reference = "null" if p.reference is None else _encode(p.reference)
    row = (
        f"[{_quoted(p.key)}, {_json(p.text)}, {_json(p.messages)}, {_json(p.completion)}, {reference}, "
        f"{_json(p.teacher_context)}, {_json(p.route)}{weight}]\n"
    )
    return row.encode("ascii")


def _json(value: str | Sequence[Message] | None) -> str:
    """A text or messages as JSON: what ``_encode`` returns, in a fifth of the time."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return _quoted(value)
    turns = (f'{{"content": {_quoted(m["content"])}, "role": {_quoted(m["role"])}}}' for m in value)
    return f"[{', '.join(turns)}]"


class PromptFile(Sequence[Prompt]):
    """The prompts of a JSON Lines file, or some of them, in the order of the file.

    They are in memory as the bytes of `row_of`, and a prompt is made when it is asked for: a million take 200 MiB
    instead of over a gigabyte. For each there are `hashes` (the first 64 bits of its content's hash), `characters` (of
    its text or messages and its teacher context), `weights`, and whether it `has_completion` and `has_messages`.
    """

    def __init__(self, rows: bytes | bytearray, columns: tuple[NDArray[Any], ...]) -> None:
        self._rows, self._columns = rows, columns
        self._ends, self._sizes, self.hashes, self.characters, self.weights = columns[:5]
        self.has_completion, self.has_messages = columns[5:]

    def where(self, chosen: NDArray[np.bool_]) -> "PromptFile":
        """The prompts for which `chosen` is true."""
        return PromptFile(self._rows, tuple(column[chosen] for column in self._columns))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...
    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        key, text, messages, completion, reference, context, route, *weight = json.loads(self.row(place))
        turns = None if messages is None else _turns(messages)
        context = _turns(context) if isinstance(context, list) else context
        return Prompt(key, text, turns, completion, reference, context, route, *weight)

    def row(self, place: int) -> bytes:
        """The bytes of `row_of` of a prompt."""
        end = int(self._ends[place])
        return bytes(self._rows[end - int(self._sizes[place]) : end])


def _turns(messages: list[Message]) -> tuple[Message, ...]:
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def load_prompts(
    path: str | Path, *, route: str | None = None, weight: str | None = None, unweighted: bool = False
) -> PromptFile:
    """The prompts of a JSON Lines file, in order; blank lines are skipped.

    Each line is an object with exactly one of `prompt` (a text) and `messages` (a list of {role, content}),
    and optionally `completion`, `id`, `reference` and `teacher_context` (a text, or messages); with `route`, the
    field of that name, a string, is each prompt's route, with `weight`, that field, a number, its weight (with
    `unweighted` 1 if it is missing). Without an `id` the key is a hash of the content, numbered if the same content
    occurs again.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is bad; the error for a line starts with
            `file:line`.
    """
    path, rows = Path(path), bytearray()
    # Of each prompt: its end in `rows`, size, hash, characters, weight, whether it has a completion, and messages.
    columns: tuple[array[Any], ...] = tuple(array(code) for code in "qqQqdbb")
    appends = [column.append for column in columns]
    line_of_key: dict[str, int] = {}  # negative where the key is the content's hash
    repeats: dict[str, int] = {}
    for number, raw in _lines(path):
        try:
            prompt, hashed = _prompt_of_line(raw, route, weight, unweighted)
            if hashed and line_of_key.get(hashed, 0) < 0:
                repeats[hashed] = repeats.get(hashed, 1) + 1
                prompt = replace(prompt, key=f"{hashed}-{repeats[hashed]}")
            if before := line_of_key.get(prompt.key):
                raise DataError(
                    f'id "{prompt.key}" was already given on line {abs(before)}; every id must be unique'
                )
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        line_of_key[prompt.key] = -number if hashed else number
        rows += (row := row_of(prompt))
        appends[0](len(rows))
        appends[1](len(row))
        appends[2](int((hashed or content_hash(prompt))[:16], 16))
        appends[3](_characters(prompt))
        appends[4](prompt.weight)
        appends[5](prompt.completion is not None)
        appends[6](prompt.messages is not None)
    if not rows:
        raise DataError(
            f'{path}: no prompts in it; expected one JSON object per line, such as {{"prompt": "…"}}'
        )
    *numbers, completions, conversations = (np.array(column) for column in columns)
    return PromptFile(rows, (*numbers, completions.astype(bool), conversations.astype(bool)))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        # A binary file is split only at b"\n", not at U+2028, which JSON strings may contain.
        with open_file(path, DataError) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, line.removesuffix(b"\n")
    except OSError as fault:
        raise DataError(f"{path} cannot be read: {fault.strerror or fault}") from None


def _characters(prompt: Prompt) -> int:
    parts = (prompt.text, prompt.messages, prompt.teacher_context)
    return sum(
        len(part) if isinstance(part, str) else sum(len(message["content"]) for message in part)
        for part in parts
        if part is not None
    )


def characters_of(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """The number of characters of each prompt, with its teacher context."""
    if isinstance(prompts, PromptFile):
        return prompts.characters
    return np.array([_characters(prompt) for prompt in prompts], np.int64)


def weights_of(prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    """The weight of each prompt."""
    if isinstance(prompts, PromptFile):
        return prompts.weights
    return np.array([prompt.weight for prompt in prompts], np.float64)


def lacking_completion(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts without a completion."""
    if isinstance(prompts, PromptFile):
        return prompts.where(~prompts.has_completion)
    return [prompt for prompt in prompts if prompt.completion is None]


def any_messages(prompts: Sequence[Prompt]) -> bool:
    """Whether a prompt is a conversation."""
    if isinstance(prompts, PromptFile):
        return bool(prompts.has_messages.any())
    return any(prompt.messages is not None for prompt in prompts)


def split_by_hash(
    prompts: Sequence[Prompt], heldout_share: float
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The training prompts and the held-out prompts, each in the given order.

    A prompt is held out if the hash of its content, as a number in [0, 1), is below `heldout_share`: adding or removing
    prompts never moves another one, and equal contents are never on both sides.

    Raises:
        ConfigError: `heldout_share` is not in [0, 1).
        DataError: a side that should have prompts has none.
    """
    if not 0.0 <= heldout_share < 1.0:
        raise ConfigError(f"heldout_share is {heldout_share}; expected a number from 0 to below 1")
    # 52 bits: an exact float, so the comparison is the same on every machine.
    train, heldout = _sides(prompts, (_hashes(prompts) >> np.uint64(12)) / 2.0**52 < heldout_share)
    if not train:
        raise DataError(
            f"none of the {len(prompts)} prompts is left to train on; add prompts or lower heldout_share"
        )
    if heldout_share > 0.0 and not heldout:
        raise DataError(
            f"none of the {len(prompts)} prompts is held out at a share of {heldout_share}; "
            "add prompts, raise heldout_share, or give a held-out file of their own"
        )
    return train, heldout


def hold_out(prompts: Sequence[Prompt], count: int) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The training prompts and `count` held-out prompts, of few prompts at most a fifth, each in the given order.

    Those with the smallest hashes of their content are held out; prompts of equal content stay together, so that there
    may be more.

    Raises:
        DataError: none is left to train on.
    """
    hashes = _hashes(prompts)
    ordered = np.sort(hashes)
    count = min(count, max(1, len(prompts) // 5))
    train, heldout = _sides(prompts, hashes <= ordered[count - 1])
    if not train:
        raise DataError(
            f"none of the {len(prompts)} prompts is left to train on: some are held out, and equal ones with them; add "
            "prompts, or give a held-out file of their own"
        )
    return train, heldout


def _hashes(prompts: Sequence[Prompt]) -> NDArray[np.uint64]:
    """The first 64 bits of each content's hash."""
    if isinstance(prompts, PromptFile):
        return prompts.hashes
    return np.array([int(content_hash(prompt)[:16], 16) for prompt in prompts], np.uint64)


def _sides(
    prompts: Sequence[Prompt], heldout: NDArray[np.bool_]
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    if isinstance(prompts, PromptFile):
        return prompts.where(~heldout), prompts.where(heldout)
    both: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt, is_heldout in zip(prompts, heldout.tolist(), strict=True):
        both[is_heldout].append(prompt)
    return both


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "a string"),
    "completion": ((str,), "a string"),
    "messages": ((list,), 'a list of {"role": …, "content": …}'),
    "teacher_context": ((str, list), "a string, or a list of messages"),
}
"""The JSON types of a line's values, and their names in errors."""


def _prompt_of_line(
    raw: bytes, route: str | None, weight: str | None, unweighted: bool
) -> tuple[Prompt, str | None]:
    """The prompt of one line; without an id its key is its content's hash, the second value."""
    line = _object_of(raw)
    for name in line:
        if name not in LINE_KEYS and name != route and name != weight:
            raise DataError(f'unknown key "{name}"{did_you_mean(name, LINE_KEYS)}')
    get = line.get
    if route is not None and not (isinstance(get(route), str) and line[route]):
        raise DataError(f'"{route}", which names the teacher, is {_kind(get(route))}; expected a string')
    share = get(weight, 1.0 if unweighted else None) if weight is not None else 1.0
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise DataError(f'"{weight}", which is the weight, is {_kind(share)}; expected a number')
    text, messages, context, key = get("prompt"), get("messages"), get("teacher_context"), get("id")
    if (text is None) == (messages is None):
        got = "neither" if text is None else "both"
        raise DataError(f'got {got} of "prompt" and "messages"; expected exactly one of them')
    for name, value in line.items():
        if value is not None and name in _KINDS and not isinstance(value, _KINDS[name][0]):
            raise DataError(f'"{name}" is {_kind(value)}; expected {_KINDS[name][1]}')
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if not (key is None or (isinstance(key, str) and key)):
        raise DataError(f'"id" is {_kind(key)}; expected a string or an integer, not empty')
    prompt = object.__new__(Prompt)
    prompt.__dict__.update(  # as the constructor, which takes three times as long
        key=key or "-",
        text=text,
        messages=tuple(messages) if messages is not None else None,
        completion=get("completion"),
        reference=get("reference"),
        teacher_context=tuple(context) if isinstance(context, list) else context,
        route=line[route] if route else None,
        weight=share,
    )
    prompt.__post_init__()
    if key is not None:
        return prompt, None
    prompt.__dict__["key"] = hashed = content_hash(prompt)[:16]
    return prompt, hashed


def _object_of(raw: bytes) -> dict[str, Any]:
    """The JSON object in a line."""
    try:
        line = json_value(raw, _refuse_repeated_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8, byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON, {error.msg} at column {error.colno}; expected one object per line"
        ) from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"not usable JSON, {error}") from error
    if not isinstance(line, dict):
        raise DataError(f'got {_kind(line)}; expected an object such as {{"prompt": "…"}}')
    return line


def _check_text(name: str, text: object, blank_is_text: bool = False) -> None:
    if not isinstance(text, str):
        raise DataError(f'"{name}" is {_kind(text)}; expected a string')
    if not text or not (blank_is_text or text.strip()):
        raise DataError(f'"{name}" is empty; expected some text')
    _check_encodable(name, text)


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f'"{name}" holds half a surrogate pair, U+{code:04X} at character {error.start}'
        ) from error


def _check_turns(of: str, messages: Sequence[object]) -> None:
    if not messages:
        raise DataError(f'"{of}" is empty; expected at least one message')
    for place, message in enumerate(messages):
        name = f"{of}[{place}]"
        if not isinstance(message, dict):
            raise DataError(f'{name} is {_kind(message)}; expected {{"role": …, "content": …}}')
        for key in message:
            if key not in MESSAGE_KEYS:
                raise DataError(f'unknown key "{key}" in {name}{did_you_mean(str(key), MESSAGE_KEYS)}')
        for key in MESSAGE_KEYS:
            if not isinstance(message.get(key), str):
                raise DataError(f'"{key}" of {name} is {_kind(message.get(key))}; expected a string')
        if message["role"] not in ROLES:
            raise DataError(
                f'unknown role "{message["role"]}" in {name}{did_you_mean(message["role"], ROLES)}'
            )
        _check_encodable(f"{name}.content", message["content"])


def _check_messages(messages: Sequence[object]) -> None:
    _check_turns("messages", messages)
    last = cast(Message, messages[-1])
    if last["role"] == "assistant":
        raise DataError(
            'the last message is the assistant\'s; expected a turn to answer, give answers as "completion"'
        )
    if not last["content"].strip():
        raise DataError("the last message is empty; expected some text to answer")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    line = dict(pairs)
    if len(line) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f'key "{twice}" is given twice in one object')
    return line


def _kind(value: object) -> str:
    """The name of a JSON value's type in errors."""
    if value is None:
        return "null or missing"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return (
        "a string" if isinstance(value, str) else "a list" if isinstance(value, list | tuple) else "an object"
    )
