"""Checks of a run's prompts on both sides: chat templates, special tokens in texts, lengths."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from gold.activity import report
from gold.data import MOST_EXAMINED, Prompt, characters_of, examined
from gold.doctor.finding import Check, Finding, failure, failures, passed, run_checks, warning
from gold.doctor.side import Side
from gold.errors import DataError
from gold.rollout.prompts import encode_prompt
from gold.tokenize.chat import (
    dropped_roles,
    has_chat_template,
    prompt_ids,
    prompt_text,
    specials_in,
)
from gold.tokenize.templates import Rendering, rendered, template_of
from gold.tokenize.vocabulary import Vocabulary

_MEASURED = 64
"""Number of prompts used to measure how many tokens each side needs for the same bytes."""
_FEW = 16
_UNLIMITED = 10**9
"""A model_max_length above it means none."""
_SLIDING = ("mistral", "mixtral", "phi3", "starcoder2")
"""Kinds of models whose layers all have the sliding window of their configuration."""
_ANOTHER_TEMPLATE = "another chat_template.jinja in its folder"


@dataclass(frozen=True)
class PromptReader:
    """One side's tokenizer and template for prompts, with or without its weights.

    ``role`` is "student", "teacher" or "teacher NAME"; ``grades`` says which prompts a teacher scores. ``context`` is
    None if unknown. A teacher reads ``adapt(prompt)``. ``limits``: see ``limits_of``.
    """

    role: str
    name: str
    tokenizer: Any
    vocabulary: Vocabulary
    rendering: Rendering
    context: int | None
    grades: Callable[[Prompt], bool] = lambda prompt: True
    adapt: Callable[[Prompt], Prompt] = attrgetter("for_teacher")
    limits: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def teaches(self) -> bool:
        """True if its prompts include the teacher context."""
        return self.role != "student"

    def seen(self, prompt: Prompt) -> Prompt:
        """The prompt for this side."""
        return self.adapt(prompt) if self.teaches else prompt

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt that is already adapted to this side.

        Raises:
            DataError: its tokenizer or template rejects the prompt.
        """
        try:
            return prompt_ids(self.tokenizer, prompt, self.rendering)
        except DataError as error:
            raise DataError(f"for {self.role} {self.name}: {error}") from error


def readers_of_sides(
    student: Side, teachers: Mapping[str, Side], *, route: str | None, several: bool
) -> list[PromptReader]:
    """The readers of a run, from files: with a ``route`` a teacher reads the prompts that name it."""

    def reader(role: str, side: Side, grades: Callable[[Prompt], bool] = lambda prompt: True) -> PromptReader:
        limits = limits_of(side.tokenizer, side.config)
        rest = side.tokenizer, side.marked, side.rendering, side.context, grades
        return PromptReader(role, side.name, *rest, limits=limits)

    def grades(name: str, prompt: Prompt) -> bool:
        return route is None or prompt.route == name

    found = [reader("student", student)]
    for name, side in teachers.items():
        found.append(reader(f"teacher {name}" if several else "teacher", side, partial(grades, name)))
    return found


def limits_of(tokenizer: Any, config: Mapping[str, Any]) -> dict[int, tuple[str, str]]:
    """Lengths in tokens beyond which a model still computes, and may do worse; each with its name and advice."""
    found = {}
    length = getattr(tokenizer, "model_max_length", None)
    if type(length) is int and 0 < length < _UNLIMITED:
        found[length] = (
            "its tokenizer's model_max_length",
            "the model may have seen no longer texts; shorten the longest prompts or lower rollout.max_new_tokens, "
            "unless its documentation says otherwise",
        )
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    slides = (
        set(kinds) == {"sliding_attention"}
        if isinstance(kinds, list)
        else config.get("model_type") in _SLIDING
    )
    if type(window) is int and window > 0 and slides:
        found[window] = (
            "the sliding window of all its layers (sliding_window)",
            "what is further back reaches a token through the layers between alone; shorten the longest prompts or "
            "lower rollout.max_new_tokens if it matters",
        )
    return found


@dataclass
class Tally:
    """Problems in one side's prompts: for each kind their number and one example.

    ``refused`` by the reason, with the error of the example; ``dropped`` and ``changed`` by the role of the message;
    ``special`` by token. ``tokens`` are the side's for the texts of some prompts.
    """

    reader: PromptReader
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    changed: dict[str, tuple[int, str]] = field(default_factory=dict)
    special: dict[str, tuple[int, str]] = field(default_factory=dict)
    with_specials: int = 0
    longest: tuple[int, str] = (0, "")
    tokens: int = 0
    conversations: int = 0
    dated: bool = False
    dropped_by_roles: dict[tuple[str, ...], list[int]] = field(default_factory=dict)


def _count(kinds: dict[str, tuple[int, str]], kind: str, example: str) -> None:
    before, first = kinds.get(kind, (0, example))
    kinds[kind] = before + 1, first


@dataclass(frozen=True)
class _Prompts:
    sides: Sequence[Tally]
    new_tokens: int
    count: int
    examined: int


def examine_prompts(
    prompts: Sequence[Prompt], heldout: Sequence[Prompt], readers: Sequence[PromptReader], new_tokens: int
) -> list[Finding]:
    """Findings about a run's prompts; the student is the first of the readers.

    A check fails where a run would be rejected.
    """
    chosen = [*examined(prompts), *examined(heldout)]
    sides = [Tally(reader) for reader in readers]
    for number, prompt in enumerate(chosen):
        report(number, len(chosen), "prompts")
        text = (prompt.completion or prompt_text(prompt))[:4096] if number < _MEASURED else ""
        for side in sides:
            if side.reader.grades(prompt):
                _tally(side, side.reader.seen(prompt), new_tokens)
            side.tokens += side.reader.vocabulary.encode(text).ids.size if text else 0
    return run_checks(PROMPT_CHECKS, _Prompts(sides, new_tokens, len(prompts) + len(heldout), len(chosen)))


def check_longest(
    prompts: Sequence[Prompt], readers: Sequence[PromptReader], new_tokens: int, note: Callable[[str], None]
) -> None:
    """Checks the longest prompts alone, before any weights are loaded: every side can read them, and the student has
    room for a completion. Notes what else the check `context` warns of.

    Raises:
        DataError: one line for each reason why not.
    """
    longest = np.argsort(-characters_of(prompts), kind="stable")[:_FEW].tolist()
    found = examine_prompts([prompts[i] for i in longest], [], readers, new_tokens)
    raise_refused(found)
    for finding in found:
        if finding.check == "context" and finding.status == "warn":
            note(str(finding))


def _tally(tally: Tally, prompt: Prompt, new_tokens: int) -> None:
    reader, known = tally.reader, tally.dropped_by_roles
    specials = specials_in(reader.tokenizer, prompt)
    tally.with_specials += bool(specials)
    for token in specials:
        _count(tally.special, token, prompt.key)
    try:
        ids = encode_prompt(reader, prompt, 1 if reader.teaches else new_tokens)
    except DataError as error:
        # Prompts are grouped by the reason, without their keys and lengths.
        _count(tally.refused, re.sub(r"\d+ tokens", "", str(error).partition(": ")[2]), str(error))
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
        except DataError:  # the template accepts only some conversations
            known[roles] = []
    for place, message in enumerate(prompt.messages):
        content = message["content"].strip()
        if content and (place in known[roles] or content not in text):
            _count(tally.dropped if place in known[roles] else tally.changed, message["role"], prompt.key)


def _reads_date(reader: PromptReader, prompt: Prompt, text: str) -> bool:
    """True if the template renders another text on another date."""
    if "strftime_now" not in (template_of(reader.tokenizer) or ""):
        return False
    other = (reader.rendering.day or date.today()) + timedelta(days=399)  # differs in day, month and year
    then = Rendering(reader.rendering.arguments, other)
    return rendered(reader.tokenizer, prompt.messages or (), then, add_generation_prompt=True) != text


def _readable(found: _Prompts) -> list[Finding]:
    findings = []
    for tally in found.sides:
        for count, reason in tally.refused.values():
            more = f" (and {count - 1:,} more prompts like it)" if count > 1 else ""
            advice = (
                f"give the {tally.reader.role} messages that its template takes (a system message could be put before "
                f"the user's text), or {_ANOTHER_TEMPLATE}"
            )
            findings.append(failure(reason + more, advice if "chat template refuses" in reason else ""))
    sampled = f" (of {found.count:,}: {MOST_EXAMINED:,} drawn with a fixed seed, and the longest)"
    some = sampled if found.examined < found.count else ""
    return findings or [passed(f"{found.examined:,} prompts{some}, which every side can read")]


def _messages(found: _Prompts) -> list[Finding]:
    findings = []
    for tally in found.sides:
        role_of, total = tally.reader.role, f"{tally.conversations:,} conversations"
        for role, (count, key) in tally.dropped.items():
            fact = f"the chat template of the {role_of} drops messages of the role {role}: in {count:,} of {total}, "
            advice = f"give them a role that the template writes (such as system), or {_ANOTHER_TEMPLATE}"
            findings.append(warning(f"{fact}such as {key}, the {role_of} never reads them", advice))
        for role, (count, key) in tally.changed.items():
            fact = f"the chat template of the {role_of} cuts or changes messages of the role {role}: in {count:,} of "
            advice = "look at one with gold align --chat; thinking is often cut from earlier answers"
            findings.append(warning(f"{fact}{total}, such as {key}", advice))
    return findings


def _prompts_with(count: int) -> str:
    return "1 prompt contains" if count == 1 else f"{count:,} prompts contain"


def _special(found: _Prompts) -> list[Finding]:
    tally = found.sides[0]
    if not tally.with_specials:
        return []
    tokens = sorted(tally.special, key=lambda token: (-tally.special[token][0], token))
    shown = ", ".join(tokens[:4]) + (" …" if len(tokens) > 4 else "")
    return [
        warning(
            f"{_prompts_with(tally.with_specials)} {shown}, in the student's vocabulary "
            f"{'a special token' if len(tokens) == 1 else 'special tokens'}; a prompt's text is read as plain "
            f"characters, so the student does not see {'that token' if len(tokens) == 1 else 'those tokens'}",
            "if a template was already applied to them, give the messages themselves ({role, content}): each side then "
            "applies its own template",
        )
    ]


def _arguments(found: _Prompts) -> list[Finding]:
    findings = []
    for reader in (tally.reader for tally in found.sides):
        template = template_of(reader.tokenizer) or ""
        if unused := [name for name in reader.rendering.arguments if not re.search(rf"\b{name}\b", template)]:
            section = re.sub("^teacher ", "teachers.", reader.role)
            fact = f"the chat template of the {reader.role} never uses {', '.join(unused)}"
            advice = f"remove it from {section}.template_kwargs, or name it as the template does"
            findings.append(warning(fact, advice))
    return findings


def _dates(found: _Prompts) -> list[Finding]:
    days: dict[str, list[str]] = {}
    for reader in (tally.reader for tally in found.sides if tally.dated):
        days.setdefault((reader.rendering.day or date.today()).isoformat(), []).append(reader.role)
    return [
        warning(
            f"the chat template of the {' and the '.join(roles)} writes the date; the whole run uses {day}",
            "template_kwargs can set another one where the template takes it (date_string of Llama 3)",
        )
        for day, roles in days.items()
    ]


def _lengths(found: _Prompts) -> list[Finding]:
    warnings, facts = [], []
    own_tokens = max(1, found.sides[0].tokens)
    for tally in found.sides:
        reader = tally.reader
        if not tally.longest[1]:
            continue
        longest, key = tally.longest
        new = math.ceil(found.new_tokens * tally.tokens / own_tokens) if reader.teaches else found.new_tokens
        about = "about " if reader.teaches else ""
        fact = f"{reader.role} {longest:,} + {about}{new:,}"
        for limit, (name, advice) in reader.limits.items():
            if longest + new > limit:
                warnings.append(warning(f"{fact} tokens exceed the {limit:,} of {name}", advice))
        if reader.context is None:
            continue
        facts.append(f"{fact} of {reader.context:,} tokens")
        if longest + new > reader.context:
            room = max(0, math.floor((reader.context - longest) * own_tokens / max(1, tally.tokens)))
            warnings.append(
                warning(
                    f"{facts[-1]}: after its longest prompt ({key}) a completion of rollout.max_new_tokens may not "
                    "fit, as estimated from the tokens that both sides need for the same bytes",
                    "such completions are left out and counted (skipped_sequences); shorten the longest prompts, or "
                    f"lower rollout.max_new_tokens to about {room:,}",
                )
            )
    if facts and not warnings:
        return [passed(f"longest prompt and new tokens: {'; '.join(facts)}")]
    return warnings


def raise_refused(findings: Sequence[Finding]) -> None:
    """Raises an error if a check has failed.

    Raises:
        DataError: one line for each failed check.
    """
    if failed := failures(findings):
        raise DataError("\n".join(f"{f.found}; {f.advice}" if f.advice else f.found for f in failed))


def notes_of(findings: Sequence[Finding]) -> list[str]:
    """Notes about the prompts before a run: warnings, and the number examined if not all were."""
    sampled = [f for f in findings if f.check == "prompts" and f.status == "pass" and "fixed seed" in f.found]
    return [str(f) for f in (*sampled, *(f for f in findings if f.status == "warn"))]


PROMPT_CHECKS: tuple[Check[_Prompts], ...] = (
    Check("prompts", "Can every side read every prompt?", _readable),
    Check("messages", "Does a chat template drop or change messages?", _messages),
    Check("template arguments", "Does each chat template use its template_kwargs?", _arguments),
    Check("special tokens", "Do prompts contain special tokens as text?", _special),
    Check(
        "context",
        "Do the longest prompt and the new tokens fit into each model's context?",
        _lengths,
    ),
    Check("date", "Does a chat template write today's date?", _dates),
)
