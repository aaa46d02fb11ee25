"""Prompts: loading from JSON Lines, splitting by content, and an order determined by seed and step."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gold.errors import ConfigError, DataError, did_you_mean
from gold.files import json_value, read_bytes

Message = dict[str, str]

LINE_KEYS = ("prompt", "messages", "completion", "id", "reference", "teacher_context")
MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """A prompt for a completion: a plain text, or the messages of a conversation; exactly one of the two.

    `key` is unique within its file and does not change when other lines are added or removed. `completion` is a given
    answer, for off-policy training; `reference` is any data for the verifier. `teacher_context` is added for teachers
    only: a text, or, before messages, messages. `route` names the prompt's teacher, if there are several.

    Raises:
        DataError: neither or both of `text` and `messages`, an empty one, an unknown role, text that UTF-8
            cannot encode, messages as the context of a plain text.
    """

    key: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    completion: str | None = None
    reference: Any = None
    teacher_context: str | tuple[Message, ...] | None = None
    route: str | None = None

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
    content = prompt.text if prompt.messages is None else [[m["role"], m["content"]] for m in prompt.messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


def load_prompts(path: str | Path, *, route: str | None = None) -> list[Prompt]:
    """The prompts of a JSON Lines file, in order; blank lines are skipped.

    Each line is an object with exactly one of `prompt` (a text) and `messages` (a list of {role, content}),
    and optionally `completion`, `id`, `reference` and `teacher_context` (a text, or messages); with `route`, the
    field of that name, a string, is each prompt's route. Without an `id` the key is a hash of the content, numbered
    if the same content occurs again.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is bad; the error for a line starts with
            `file:line`.
    """
    path = Path(path)
    data = read_bytes(path, DataError, None)

    prompts: list[Prompt] = []
    line_of_key: dict[str, int] = {}
    repeats: Counter[str] = Counter()
    # Split only at b"\n": str.splitlines would also split at U+2028, which JSON strings may contain.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            prompt, has_id = _prompt_of_line(raw, route)
            if not has_id:
                repeats[prompt.key] += 1
                if repeats[prompt.key] > 1:
                    prompt = replace(prompt, key=f"{prompt.key}-{repeats[prompt.key]}")
            if prompt.key in line_of_key:
                before = line_of_key[prompt.key]
                raise DataError(
                    f'id "{prompt.key}" was already given on line {before}; every id must be unique'
                )
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        line_of_key[prompt.key] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(
            f'{path}: no prompts in it; expected one JSON object per line, such as {{"prompt": "…"}}'
        )
    return prompts


def split_by_hash(prompts: Sequence[Prompt], heldout_share: float) -> tuple[list[Prompt], list[Prompt]]:
    """The training prompts and the held-out prompts, each in the given order.

    A prompt is held out if the hash of its content, as a number in [0, 1), is below `heldout_share`: adding or removing
    prompts never moves another one, and equal contents are never on both sides.

    Raises:
        ConfigError: `heldout_share` is not in [0, 1).
        DataError: a side that should have prompts has none.
    """
    if not 0.0 <= heldout_share < 1.0:
        raise ConfigError(f"heldout_share is {heldout_share}; expected a number from 0 to below 1")
    train: list[Prompt] = []
    heldout: list[Prompt] = []
    for prompt in prompts:
        # 52 bits: an exact float, so the comparison is the same on every machine.
        place = int(content_hash(prompt)[:13], 16) / 2**52
        (heldout if place < heldout_share else train).append(prompt)
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


@dataclass(frozen=True)
class PromptOrder:
    """The indices of each step's prompts: `count` prompts, reshuffled for every epoch.

    It is stateless: `batch` depends only on the seed and the step, so a resumed run needs no saved position.

    Raises:
        ConfigError: `count` is below 1 or `seed` below 0.
    """

    count: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"an order needs at least one prompt, got {self.count}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more")

    def batch(self, step: int, size: int) -> list[int]:
        """The indices of the `size` prompts of a step, counted from 0; a batch may span two epochs.

        The size must be the same for every step of a run: step n starts at position n·size.
        """
        if step < 0 or size < 1:
            raise ConfigError(
                f"a batch needs a step of 0 or more and a size of 1 or more, got {step} and {size}"
            )
        places = range(step * size, (step + 1) * size)
        return [int(_shuffled(self.count, self.seed, p // self.count)[p % self.count]) for p in places]


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorts raw Philox words instead of calling Generator.permutation: NumPy only promises to keep the former stable.
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    order: NDArray[np.int64] = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "a string"),
    "completion": ((str,), "a string"),
    "messages": ((list,), 'a list of {"role": …, "content": …}'),
    "teacher_context": ((str, list), "a string, or a list of messages"),
}
"""The JSON types of a line's values, and their names in errors."""


def _prompt_of_line(raw: bytes, route: str | None) -> tuple[Prompt, bool]:
    """The prompt of one line, keyed by its content's hash if it has no id, and whether it has one."""
    line = _object_of(raw)
    for name in line:
        if name not in LINE_KEYS and name != route:
            raise DataError(f'unknown key "{name}"{did_you_mean(name, LINE_KEYS)}')
    if route is not None and not (isinstance(line.get(route), str) and line[route]):
        raise DataError(f'"{route}", which names the teacher, is {_kind(line.get(route))}; expected a string')
    given = [name for name in ("prompt", "messages") if line.get(name) is not None]
    if len(given) != 1:
        got = "both" if given else "neither"
        raise DataError(f'got {got} of "prompt" and "messages"; expected exactly one of them')
    for name, (types, expected) in _KINDS.items():
        if line.get(name) is not None and not isinstance(line[name], types):
            raise DataError(f'"{name}" is {_kind(line[name])}; expected {expected}')
    key = line.get("id")
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if not (key is None or (isinstance(key, str) and key)):
        raise DataError(f'"id" is {_kind(key)}; expected a string or an integer, not empty')
    messages, context = (
        tuple(value) if isinstance(value, list) else value
        for value in (line.get("messages"), line.get("teacher_context"))
    )
    prompt = Prompt(
        key or "-",
        line.get("prompt"),
        messages,
        line.get("completion"),
        line.get("reference"),
        context,
        line[route] if route else None,
    )
    return (prompt, True) if key is not None else (replace(prompt, key=content_hash(prompt)[:16]), False)


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
