"""One look over a run's own prompts as both sides read them: what a template refuses, drops or dates, what looks like a
special token, and what does not fit a context."""

from __future__ import annotations

import heapq
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from operator import attrgetter
from typing import Any

from gold.data import Prompt
from gold.doctor.checks import Check
from gold.errors import DataError
from gold.rollout.engine import encode_prompt
from gold.tokenize.chat import (
    dropped_roles,
    has_chat_template,
    prompt_ids,
    prompt_text,
    specials_in,
)
from gold.tokenize.templates import Rendering, rendered, template_of
from gold.tokenize.vocabulary import Vocabulary

MOST = 2000
"""Prompts that are looked at; of more than these as many as this, drawn with a fixed seed, and the longest beside."""
LONGEST = 200
_SEED = 0
_MEASURED = 64
"""Prompts whose texts tell how many tokens the sides take for the same bytes."""


@dataclass(frozen=True)
class PromptReader:
    """A side that reads prompts, with or without its weights.

    ``role`` is "student", "teacher" or "teacher NAME"; ``grades`` says which prompts a teacher reads. ``context`` is
    None where nobody knows it. A teacher reads ``adapt`` of a prompt.
    """

    role: str
    name: str
    tokenizer: Any
    vocabulary: Vocabulary
    rendering: Rendering
    context: int | None
    grades: Callable[[Prompt], bool] = lambda prompt: True
    adapt: Callable[[Prompt], Prompt] = attrgetter("for_teacher")

    @property
    def teaches(self) -> bool:
        """Whether it reads what teachers alone are told."""
        return self.role != "student"

    def seen(self, prompt: Prompt) -> Prompt:
        """The prompt as this side has it."""
        return self.adapt(prompt) if self.teaches else prompt

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that it reads before a completion of a prompt as it has it.

        Raises:
            DataError: it cannot read the prompt.
        """
        try:
            return prompt_ids(self.tokenizer, prompt, self.rendering)
        except DataError as error:
            raise DataError(f"for {self.role} {self.name}: {error}") from error


@dataclass
class Tally:
    """What was found of one side's prompts; those of several processes add up.

    Of each kind how many prompts there are, and one: ``refused`` by what is wrong with them, with the line of that
    one, ``dropped`` and ``changed`` by the role of the message, ``special`` by token.
    """

    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    changed: dict[str, tuple[int, str]] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    held: int = 0
    longest: tuple[int, str] = (0, "")
    tokens: int = 0
    conversations: int = 0
    dated: bool = False

    def add(self, other: Tally) -> None:
        """Takes what another process has found."""
        for token, count in other.special.items():
            self.special[token] = self.special.get(token, 0) + count
        for name in ("refused", "dropped", "changed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, (count, shown) in theirs.items():
                before, first = mine.get(key, (0, shown))
                mine[key] = before + count, first
        self.held += other.held
        self.longest = max(self.longest, other.longest)
        self.tokens += other.tokens
        self.conversations += other.conversations
        self.dated = self.dated or other.dated


def looked_at(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that are looked at: all, or of very many some drawn with a fixed seed and the longest ones."""
    if len(prompts) <= MOST:
        return list(prompts)
    drawn = random.Random(_SEED).sample(range(len(prompts)), MOST)
    longest = heapq.nlargest(LONGEST, range(len(prompts)), key=lambda i: _size(prompts[i]))
    return [prompts[i] for i in sorted({*drawn, *longest})]


def look(prompts: Iterable[Prompt], readers: Sequence[PromptReader], new_tokens: int) -> list[Tally]:
    """What each side finds in these prompts."""
    tallies = [Tally() for _ in readers]
    shapes: list[dict[tuple[str, ...], list[int]]] = [{} for _ in readers]
    for number, prompt in enumerate(prompts):
        text = (prompt.completion or prompt_text(prompt))[:4096] if number < _MEASURED else ""
        for reader, tally, known in zip(readers, tallies, shapes, strict=True):
            if reader.grades(prompt):
                _look_at(reader, reader.seen(prompt), new_tokens, tally, known)
            tally.tokens += reader.vocabulary.encode(text).ids.size if text else 0
    return tallies


def examine_prompts(
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    readers: Sequence[PromptReader],
    new_tokens: int,
    *,
    share: tuple[int, int] = (0, 1),
    gathered: Callable[[list[list[Tally]]], list[list[Tally]]] = lambda own: own,
) -> list[Check]:
    """What stands in the way of a run's prompts, the student being the first of the readers; a run that would be
    refused has a failed check.

    ``share`` is which process this is, of how many: each looks at its part, and ``gathered`` collects what all found.
    """
    chosen = [*looked_at(prompts), *looked_at(heldout)]
    tallies = [Tally() for _ in readers]
    for found in gathered([look(chosen[share[0] :: share[1]], readers, new_tokens)]):
        for mine, theirs in zip(tallies, found, strict=True):
            mine.add(theirs)
    checks = [*_told(len(prompts) + len(heldout), len(chosen))]
    for reader, tally in zip(readers, tallies, strict=True):
        checks += [*_refused(reader, tally), *_shown(reader, tally), *_arguments(reader, tally)]
    checks += [
        *_special(readers[0], tallies[0]),
        *_lengths(readers, tallies, new_tokens),
        *_dates(readers, tallies),
    ]
    if all(check.status == "pass" for check in checks):
        checks.append(Check("prompts", "pass", f"{len(chosen):,} prompts, which every side can read"))
    return checks


def _look_at(
    reader: PromptReader,
    prompt: Prompt,
    new_tokens: int,
    tally: Tally,
    known: dict[tuple[str, ...], list[int]],
) -> None:
    if found := specials_in(reader.tokenizer, prompt):
        tally.held += 1
        for token in found:
            tally.special[token] = tally.special.get(token, 0) + 1
    try:
        ids = encode_prompt(reader, prompt, 1 if reader.teaches else new_tokens)
    except DataError as error:
        # What they have in common is wrong; one of them is enough of an example.
        kind = re.sub(r"\d+ tokens", "", str(error).partition(": ")[2])
        count, first = tally.refused.get(kind, (0, str(error)))
        tally.refused[kind] = count + 1, first
        return
    tally.longest = max(tally.longest, (len(ids), prompt.key))
    if prompt.messages is None or not has_chat_template(reader.tokenizer):
        return
    tally.conversations += 1
    text = rendered(reader.tokenizer, prompt.messages, reader.rendering, add_generation_prompt=True)
    if tally.conversations == 1:
        tally.dated = _reads_date(reader, prompt, text)
    roles = tuple(message["role"] for message in prompt.messages)
    if roles not in known:
        try:
            known[roles] = dropped_roles(reader.tokenizer, prompt.messages, reader.rendering)
        except DataError:  # it takes these messages and no others
            known[roles] = []
    for place, message in enumerate(prompt.messages):
        content = message["content"].strip()
        if content and (place in known[roles] or content not in text):
            what = tally.dropped if place in known[roles] else tally.changed
            count, key = what.get(message["role"], (0, prompt.key))
            what[message["role"]] = count + 1, key


def _reads_date(reader: PromptReader, prompt: Prompt, text: str) -> bool:
    """Whether the template writes another text on another day."""
    if "strftime_now" not in (template_of(reader.tokenizer) or ""):
        return False
    other = (reader.rendering.day or date.today()) + timedelta(days=399)  # another day, month and year
    then = Rendering(reader.rendering.arguments, other)
    return rendered(reader.tokenizer, prompt.messages or (), then, add_generation_prompt=True) != text


def _size(prompt: Prompt) -> int:
    context = prompt.teacher_context or ""
    told = len(context) if isinstance(context, str) else sum(len(m["content"]) for m in context)
    return told + (len(prompt.text) if prompt.text else sum(len(m["content"]) for m in prompt.messages or ()))


# What is told of it


def _told(count: int, looked: int) -> list[Check]:
    if looked == count:
        return []
    found = f"{looked:,} of {count:,} were looked at: {MOST:,} drawn with a fixed seed, and the longest"
    return [Check("prompts", "pass", found)]


def _refused(reader: PromptReader, tally: Tally) -> list[Check]:
    checks = []
    for count, reason in tally.refused.values():
        more = f" (and {count - 1:,} more prompts like it)" if count > 1 else ""
        template = "chat template refuses" in reason
        advice = (
            f"give the {reader.role} messages that its template takes (a system message could stand before what "
            "the user says), or another chat_template.jinja in its folder"
        )
        checks.append(Check("prompts", "fail", reason + more, advice if template else ""))
    return checks


def _shown(reader: PromptReader, tally: Tally) -> list[Check]:
    checks = []
    for role, (count, key) in tally.dropped.items():
        checks.append(
            Check(
                "messages",
                "warn",
                f"the chat template of the {reader.role} drops messages of the role {role}: in {_many(count, tally)}, "
                f"such as {key}, the {reader.role} never reads what they say",
                "give it a role that the template writes (system, or the text in front of the user's), or another "
                "chat_template.jinja in its folder",
            )
        )
    for role, (count, key) in tally.changed.items():
        checks.append(
            Check(
                "messages",
                "warn",
                f"the chat template of the {reader.role} shows messages of the role {role} cut or changed: in "
                f"{_many(count, tally)}, such as {key}",
                "look at one with gold align --chat; thinking is often cut from earlier answers",
            )
        )
    return checks


def _many(count: int, tally: Tally) -> str:
    return f"{count:,} of {tally.conversations:,} conversations"


def _special(student: PromptReader, tally: Tally) -> list[Check]:
    if not tally.held:
        return []
    tokens = sorted(tally.special, key=lambda token: (-tally.special[token], token))
    shown = ", ".join(tokens[:4]) + (" …" if len(tokens) > 4 else "")
    return [
        Check(
            "special tokens",
            "warn",
            f"{tally.held:,} prompts hold {shown} as text: special tokens of the student, which it reads as characters",
            "where a template was applied to them already, give the messages themselves ({role, content}): each side "
            "then reads them in its own template",
        )
    ]


def _arguments(reader: PromptReader, tally: Tally) -> list[Check]:
    template = template_of(reader.tokenizer) or ""
    idle = [name for name in reader.rendering.arguments if not re.search(rf"\b{name}\b", template)]
    if not idle:
        return []
    section = (
        reader.role if reader.role in ("student", "teacher") else f"teachers.{reader.role.partition(' ')[2]}"
    )
    found = f"the chat template of the {reader.role} never asks for {', '.join(idle)}"
    advice = f"leave it out of {section}.template_kwargs, or spell it as the template does"
    return [Check("template arguments", "warn", found, advice)]


def _dates(readers: Sequence[PromptReader], tallies: Sequence[Tally]) -> list[Check]:
    days: dict[str, list[str]] = {}
    for reader, tally in zip(readers, tallies, strict=True):
        if tally.dated:
            days.setdefault((reader.rendering.day or date.today()).isoformat(), []).append(reader.role)
    return [
        Check(
            "date",
            "warn",
            f"the chat template of the {' and the '.join(roles)} writes the date; all of the run reads {day}",
            "template_kwargs can name another one where the template asks for it (date_string of Llama 3)",
        )
        for day, roles in days.items()
    ]


def _lengths(readers: Sequence[PromptReader], tallies: Sequence[Tally], new_tokens: int) -> list[Check]:
    checks, found = [], []
    mine = max(1, tallies[0].tokens)
    for reader, tally in zip(readers, tallies, strict=True):
        if reader.context is None or not tally.longest[1]:
            continue
        longest, key = tally.longest
        new = math.ceil(new_tokens * tally.tokens / mine) if reader.teaches else new_tokens
        about = "about " if reader.teaches else ""
        fact = f"{reader.role} {longest:,} + {about}{new:,} of {reader.context:,} tokens"
        found.append(fact)
        if longest + new > reader.context:
            room = max(0, math.floor((reader.context - longest) * mine / max(1, tally.tokens)))
            checks.append(
                Check(
                    "context",
                    "warn",
                    f"{fact}: behind its longest prompt ({key}) a completion of rollout.max_new_tokens may not fit, as "
                    "estimated from the tokens that both sides take for the same bytes",
                    "such completions are left out and counted (unread); shorten the longest prompts, or lower "
                    f"rollout.max_new_tokens to about {room:,}",
                )
            )
    if found and not checks:
        checks.append(Check("context", "pass", f"longest prompt and new tokens: {'; '.join(found)}"))
    return checks


def raise_refused(checks: Sequence[Check]) -> None:
    """Nothing, where no check has failed.

    Raises:
        DataError: one line for each that has.
    """
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        raise DataError("\n".join(f"{c.found}; {c.advice}" if c.advice else c.found for c in failed))


def notes_of(checks: Sequence[Check]) -> list[str]:
    """What a person should know of the prompts before a run."""
    sampled = [f"{c.check}: {c.found}" for c in checks if c.check == "prompts" and "fixed seed" in c.found]
    return sampled + [f"{c.check}: {c.found}; {c.advice}" for c in checks if c.status == "warn"]
