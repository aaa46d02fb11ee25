"""What the columns of a row mean: the conventions that are understood, and the map that renames columns to them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gold.data.prompt import ROLES, Message, Prompt, content_hash, kind_of
from gold.errors import ConfigError, DataError, did_you_mean
from gold.files import json_value

Row = Mapping[str, Any]
Renamed = Mapping[str, str | None]

MAIN: dict[str, tuple[str, ...]] = {
    "prompt": ("system",),
    "messages": ("system",),
    "conversations": ("system",),
    "instruction": ("input", "output", "system"),
    "question": ("answer", "system"),
}
"""The columns that make a row a prompt, each with those that belong to it."""
EXPLICIT = ("prompt", "messages", "conversations")
"""Where a row has one of these, instruction and question are ordinary columns."""
COMMON = ("completion", "id", "reference", "teacher_context")
"""Columns that any row can have."""
UNDERSTOOD = tuple(dict.fromkeys((*MAIN, *COMMON, *(name for names in MAIN.values() for name in names))))
LINE_KEYS = ("prompt", "messages", *COMMON)
"""The columns of a row that needs no interpretation."""

ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Other names of roles, as in ShareGPT's `from`."""
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MESSAGES = 'a list of {"role": …, "content": …}'
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "a string"),
    "completion": ((str,), "a string"),
    "messages": ((list,), _MESSAGES),
    "teacher_context": ((str, list), "a string, or a list of messages"),
}
"""The JSON types of a row's values, and their names in errors."""


def check_map(renamed: Renamed) -> dict[str, str | None]:
    """A map of understood names to columns, or to None for columns that are not to be read.

    Raises:
        ConfigError: a name that is not understood, or two columns that would both be the prompt.
    """
    for name in renamed:
        if name not in UNDERSTOOD:
            raise ConfigError(f"{name} is no column that is understood{did_you_mean(name, UNDERSTOOD)}")
    if len(given := [name for name in MAIN if renamed.get(name)]) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} would both be the prompt: keep one")
    return dict(renamed)


@dataclass(frozen=True)
class _Plan:
    """What is read of rows with the same columns: names with their columns, names with parts of columns, those that
    can be the prompt, and for each of these the columns that are then read."""

    direct: list[tuple[str, str]]
    parts: list[tuple[str, str]]
    mains: list[str]
    roots: dict[str, set[str]]


class Columns:
    """Makes prompts of rows, and keeps count of the columns that it reads and of those that it does not.

    ``renamed`` is the map; ``route`` and ``weight`` name columns, ``unweighted`` allows the latter to be missing.
    ``texts``: every value is a text, as in CSV.
    """

    def __init__(
        self,
        renamed: Renamed | None = None,
        route: str | None = None,
        weight: str | None = None,
        *,
        unweighted: bool = False,
        texts: bool = False,
    ) -> None:
        self.map = check_map(renamed or {})
        self.route, self.weight, self.unweighted, self.texts = route, weight, unweighted, texts
        self.kinds: Counter[str] = Counter()
        self.used: dict[str, None] = {}
        self.ignored: dict[str, None] = {}
        self.blank_answers = 0
        """rows whose answer is an empty text, which counts as none"""
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._own = {name for name in (route, weight) if name is not None}
        self._plain = frozenset({*LINE_KEYS, *self._own})
        self._reads: dict[str, str] = {n: n for n in UNDERSTOOD if n not in self.map}
        if any(self.map.get(name) for name in MAIN):
            self._reads = {name: name for name in self._reads if name not in MAIN}
        self._reads |= {name: column for name, column in self.map.items() if column is not None}

    @property
    def needed(self) -> set[str]:
        """The names of all columns that may be read; parts of columns have a dot."""
        return {*self._reads.values(), *self._own}

    def prompt_of(self, row: Row) -> tuple[Prompt, str | None]:
        """The prompt of a row; without an id its key is its content's hash, the second value.

        Raises:
            DataError: the row is no prompt.
        """
        route, weight = self._route_of(row), self._weight_of(row)
        fields = row if self._is_plain(row) else self._fields(row)
        get = fields.get
        text, messages, context, key = get("prompt"), get("messages"), get("teacher_context"), get("id")
        if (text is None) == (messages is None):
            raise self._no_prompt(row) if text is None else self._several(["prompt", "messages"])
        for name, value in fields.items():
            if value is not None and name in _KINDS and not isinstance(value, _KINDS[name][0]):
                raise DataError(f'"{name}" is {kind_of(value)}; expected {_KINDS[name][1]}')
        if isinstance(key, int) and not isinstance(key, bool):
            key = str(key)
        if not (key is None or (isinstance(key, str) and key)):
            raise DataError(
                f'"id" is {kind_of(key)}; expected a string or an integer, not empty; map: {{id: null}} leaves it out'
            )
        prompt = object.__new__(Prompt)
        prompt.__dict__.update(  # as the constructor, which takes three times as long
            key=key or "-",
            text=text,
            messages=tuple(messages) if messages is not None else None,
            completion=get("completion"),
            reference=get("reference"),
            teacher_context=tuple(context) if isinstance(context, list) else context,
            route=route,
            weight=weight,
        )
        prompt.__post_init__()
        if key is not None:
            return prompt, None
        prompt.__dict__["key"] = hashed = content_hash(prompt)[:16]
        return prompt, hashed

    def _route_of(self, row: Row) -> str | None:
        if self.route is None:
            return None
        if not (isinstance(found := row.get(self.route), str) and found):
            raise DataError(
                f'"{self.route}", which names the teacher, is {kind_of(found)}; expected a string'
            )
        return found

    def _weight_of(self, row: Row) -> float:
        if self.weight is None:
            return 1.0
        found: Any = row.get(self.weight, 1.0 if self.unweighted else None)
        if self.texts and self.unweighted and found is None:
            found = 1.0
        if self.texts and isinstance(found, str):
            try:
                found = float(found)
            except ValueError:
                raise DataError(
                    f'"{self.weight}", which is the weight, is {found!r}; expected a number'
                ) from None
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise DataError(f'"{self.weight}", which is the weight, is {kind_of(found)}; expected a number')
        return found

    def _is_plain(self, row: Row) -> bool:
        """True for a row of texts, or of messages without an answer, under the names of this project."""
        if self.map or not row.keys() <= self._plain:
            return False
        text, messages, answer = row.get("prompt"), row.get("messages"), row.get("completion")
        if answer == "" or type(answer) is list or type(row.get("teacher_context")) is list:
            return False
        if type(text) is str:
            kind = "prompt"
        elif text is None and type(messages) is list and _are_plain(messages):
            if messages[-1]["role"] == "assistant":
                return False
            kind = "messages"
        else:
            return False
        self.kinds[kind] += 1
        for name in row:
            if name not in self.used:
                self.used[name] = None
        return True

    def _plan(self, keys: tuple[str, ...]) -> _Plan:
        """What is read of rows with these columns."""
        direct = [(name, column) for name, column in self._reads.items() if column in keys]
        parts = [(name, column) for name, column in self.map.items() if column and column not in keys]
        mains = [
            name for name in MAIN if name in self._reads and (self._reads[name] in keys or name in self.map)
        ]
        roots = {}
        for main in mains:
            reads = [self._reads[name] for name in (main, *MAIN[main], *COMMON) if name in self._reads]
            roots[main] = self._own | {c if c in keys else c.partition(".")[0] for c in reads}
        return _Plan(direct, parts, mains, roots)

    def _fields(self, row: Row) -> dict[str, Any]:
        """The fields of a prompt: a prompt or messages, and the common columns."""
        keys = tuple(row)
        if (plan := self._plans.get(keys)) is None:
            plan = self._plans[keys] = self._plan(keys)
        taken = {name: row[column] for name, column in plan.direct}
        for name, column in plan.parts:
            taken[name] = self._value(row, name, column)
        given = [name for name in plan.mains if taken[name] is not None]
        if len(given) > 1:
            given = [name for name in given if name in EXPLICIT] or given
        if len(given) > 1:
            raise self._several(given)
        if not given:
            raise self._no_prompt(row)
        main = given[0]
        self.kinds[main] += 1
        roots, used, ignored = plan.roots[main], self.used, self.ignored
        for column, value in row.items():
            found = used if column in roots else ignored
            if column not in found and value is not None:
                found[column] = None
        fields = {name: taken.get(name) for name in COMMON}
        context = fields["teacher_context"]
        if isinstance(context, list):
            fields["teacher_context"] = self._turns("teacher_context", context)
        answer = self._answer(fields["completion"])
        if main == "prompt" and not isinstance(taken["prompt"], list):
            if taken.get("system") is not None:
                raise DataError(
                    '"system" goes before messages, and the prompt is a plain text; give it as messages, or leave the '
                    "column out (map: {system: null})"
                )
            return {**fields, "prompt": taken["prompt"], "completion": answer}
        turns, last = self._conversation(main, taken)
        if last is not None and answer is not None:
            raise DataError(
                f'both "completion" and the answer in "{self._reads[main]}" are given; leave one out '
                "(map: {completion: null})"
            )
        return {**fields, "messages": turns, "completion": answer if last is None else last}

    def _value(self, row: Row, name: str, column: str) -> Any:
        """The value of a part of a column, whose name has dots."""
        found: Any = row
        for part in column.split("."):
            if not isinstance(found, Mapping) or part not in found:
                has = found if isinstance(found, Mapping) else row
                raise DataError(
                    f'no column "{column}", which the map reads as {name}{did_you_mean(column, has)}'
                )
            found = found[part]
        return found

    def _conversation(self, main: str, taken: Mapping[str, Any]) -> tuple[list[Message], str | None]:
        """The turns up to the answer, and the answer if the row has one."""
        column = self._reads[main]
        last: str | None = None
        if main in EXPLICIT:
            turns = self._turns(column, taken[main])
            if turns[-1]["role"] == "assistant":
                turns, last = turns[:-1], turns[-1]["content"]
            if not turns:
                raise DataError(f'"{column}" holds an answer alone; expected a turn before it')
        else:
            parts = [(column, taken[main])]
            if main == "instruction":
                parts.append((self._reads.get("input", "input"), taken.get("input")))
            text = "\n\n".join(filter(None, (_text(name, part) for name, part in parts if part is not None)))
            turns = [{"role": "user", "content": text}]
            answer = "output" if main == "instruction" else "answer"
            if taken.get(answer) is not None:
                last = _text(self._reads[answer], taken[answer])
        system = taken.get("system")
        if system is not None and _text(self._reads["system"], system):
            if turns[0]["role"] not in ("system", "developer"):
                turns = [{"role": "system", "content": system}, *turns]
            elif turns[0]["content"] != system:
                raise DataError(
                    f'"{self._reads["system"]}" is given, and "{column}" begins with another system message; leave '
                    "one out (map: {system: null})"
                )
        if last == "":
            self.blank_answers += 1
            last = None
        return turns, last

    def _answer(self, given: Any) -> Any:
        """A completion: a text, or a list with the one message of the assistant (TRL)."""
        if given == "":
            self.blank_answers += 1
            return None
        if not isinstance(given, list):
            return given
        turns = self._turns("completion", given)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise DataError(
                f'"completion" has the turns {", ".join(turn["role"] for turn in turns)}; expected one of the '
                "assistant (earlier turns belong to the prompt)"
            )
        if not turns[0]["content"]:
            self.blank_answers += 1
        return turns[0]["content"] or None

    def _turns(self, column: str, given: Any) -> list[Message]:
        """The messages of a conversation, in any of the spellings."""
        if isinstance(given, str) and given.lstrip().startswith("["):
            try:
                given = json_value(given)
            except ValueError as error:
                raise DataError(
                    f'"{column}" is a text and no JSON ({_reason(error)}); lists are written as JSON in a text (pandas '
                    "writes Python: save as JSON lines or parquet)"
                ) from None
        if not isinstance(given, list):
            raise DataError(f'"{column}" is {kind_of(given)}; expected {_MESSAGES}')
        if not given:
            raise DataError(f'"{column}" is empty; expected at least one message')
        if _are_plain(given):
            return given
        return [self._turn(column, place, message) for place, message in enumerate(given)]

    def _turn(self, column: str, place: int, message: Any) -> Message:
        name = f"{column}[{place}]"
        if not isinstance(message, dict):
            raise DataError(f'{name} is {kind_of(message)}; expected {{"role": …, "content": …}}')
        role, content = message.get("role"), message.get("content")
        if len(message) == 2 and type(content) is str and role in ROLES:
            return message
        keys = "role", "content"
        if role is None and message.get("from") is not None:
            keys, role, content = ("from", "value"), message["from"], message.get("value")
        for key, value in message.items():
            if value is None or value == [] or key in keys:
                continue
            if key in _CALLS:
                raise DataError(
                    f"{name} has {key}, and gold reads text alone; leave such rows out, or write the call as text"
                )
            self.ignored.setdefault(f"{column}[].{key}")
        if not isinstance(role, str):
            raise DataError(f'"{keys[0]}" of {name} is {kind_of(role)}; expected a string')
        role = role if role in ROLES else ROLE_OF.get(role, role)
        if role not in ROLES:
            raise DataError(f'unknown role "{role}" in {name}{did_you_mean(role, (*ROLES, *ROLE_OF))}')
        if isinstance(content, list):
            content = "\n".join(_part(f"{name}.{keys[1]}[{i}]", part) for i, part in enumerate(content))
        if not isinstance(content, str):
            raise DataError(f'"{keys[1]}" of {name} is {kind_of(content)}; expected a string')
        return {"role": role, "content": content}

    def _several(self, given: list[str]) -> DataError:
        columns = [self._reads[name] for name in given]
        shown = " and ".join(f'"{column}"' for column in columns)
        return DataError(
            f"got both {shown}; expected one prompt: name the one to read in the map, such as "
            f"{{{given[-1]}: {columns[-1]}}}"
        )

    def _no_prompt(self, row: Row) -> DataError:
        """What is wrong with a row in which no column is a prompt."""
        columns = [self._reads[name] for name in MAIN if name in self._reads]
        if empty := [column for column in columns if column in row]:
            return DataError(f'"{empty[0]}" is null or empty; expected a prompt')
        for name in row:
            if name not in UNDERSTOOD and (near := did_you_mean(name, UNDERSTOOD, "")):
                return DataError(f'unknown key "{name}"{near}')
        has = ", ".join(map(str, list(row)[:12])) or "none"
        return DataError(
            f"got neither {' nor '.join(columns)}; its columns are {has}: name the one to read in the map, such as "
            f"{{prompt: {next(iter(row), 'text')}}}"
        )


def _are_plain(messages: list[Any]) -> bool:
    """True for messages that hold nothing but a known role and a text."""
    for message in messages:
        if type(message) is not dict or len(message) != 2 or type(message.get("content")) is not str:
            return False
        if message.get("role") not in ROLES:
            return False
    return bool(messages)


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f'"{column}" is {kind_of(value)}; expected a string')
    return value


def _part(name: str, part: Any) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise DataError(f'{name} is {kind_of(part)}; expected {{"type": "text", "text": …}}')
    kind, text = part.get("type"), part.get("text")
    if kind in (None, *_TEXT_PARTS) and isinstance(text, str):
        return text
    raise DataError(
        f"{name} is of type {kind if isinstance(kind, str) else kind_of(kind)}, and gold reads text alone; leave such "
        "rows out, or take the part out"
    )


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return str(error)
