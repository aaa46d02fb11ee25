"""The parts of a turn that student and teacher can be compared on, where their templates write a turn differently.

A turn whose thinking and tool calls both sides write alike is one text. If a teacher's template has other markers,
these are no common text, and the turn is compared piece by piece: the thinking, the prose, the name of each call, and
its arguments where both sides write them as JSON. Each piece is a row of its own, whose prompt ends, on each side, with
that side's own form of what comes before it; what is in no piece is not compared, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from gold.rollout.conversations import as_turn
from gold.rollout.types import Rollout, Segment
from gold.tokenize.conversation import TemplateForm
from gold.tokenize.vocabulary import TokenizedText
from gold.turns import CUT, TurnMessage, TurnPrompt, Written, read_turn, tool_call

Thinking = Literal["compare", "mask"]


class Piece(NamedTuple):
    """A range of a turn's text in characters, and the message up to it, with ``CUT`` where it begins; None: the text
    itself is before it. ``ends``: the end of the turn belongs to it."""

    start: int
    end: int
    begun: TurnMessage | None
    ends: bool = False


def pieces_of(
    written: Written, forms: Sequence[TemplateForm], thinking: Thinking, cut: bool = False
) -> list[Piece] | None:
    """The pieces of a turn that are compared with teachers of these forms; None: the whole turn is. ``cut``: the end of
    its thinking was given, so that thinking and answer are pieces in any case."""
    masked = written.thinking is not None and thinking == "mask"
    other_thinking = written.thinking is not None and any(
        not _same_markers(written, form.thinking) for form in forms if form.thinking is not None
    )
    other_calls = bool(written.calls) and any(form.calls not in (None, written.form) for form in forms)
    if not (masked or other_thinking or other_calls or cut):
        return None
    size = len(written.text)
    before: TurnMessage = {"role": "assistant", "content": ""}
    found: list[Piece] = []
    start = 0
    if written.thinking is not None and (masked or other_thinking or cut):
        if other_thinking and not masked:
            found.append(Piece(*written.thinking, {**before, "reasoning_content": CUT}))
        elif not masked:
            found.append(Piece(0, written.thinking[1], None))
        before |= {"reasoning_content": written.reasoning, "keep_thinking": not masked}
        start = written.answer
    if not other_calls:
        found.append(Piece(start, size, {**before, "content": CUT} if start else None, ends=True))
        return _not_empty(found)
    assert written.calls_start is not None
    prose = {**before, "content": CUT} if start else None
    found.append(Piece(start, written.calls_start, prose))
    as_json = all(form.json_arguments for form in forms)
    content = written.prose if start else written.message(thinking=False)["content"]
    calls: list[TurnMessage] = []
    for call in written.calls:
        begun = {call.name_span: tool_call(CUT, dict(call.arguments))}
        if as_json and not call.untyped:
            begun[call.arguments_span] = tool_call(call.name, {CUT: 0})
        for span, its in begun.items():
            found.append(Piece(*span, {**before, "content": content, "tool_calls": [*calls, its]}))
        calls.append(tool_call(call.name, dict(call.arguments)))
    return _not_empty(found)


def _not_empty(pieces: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.end > piece.start or piece.ends]


def _same_markers(written: Written, markers: tuple[str, str]) -> bool:
    assert written.thinking is not None
    first, last = written.thinking
    before, after = written.text[:first].strip(), written.text[last : written.answer].strip()
    theirs = [marker.strip() for marker in markers]
    # Before a call a template may go on in another way than before an answer.
    return before == theirs[0] and (
        after == theirs[1] or (bool(written.calls) and theirs[1].startswith(after))
    )


class Rows(NamedTuple):
    """The rows of some rollouts that are compared with teachers, the number of the rollout of each, and the rows of
    what is not compared."""

    compared: list[Rollout]
    numbers: list[int]
    others: list[Rollout]


def rows_of(
    rollouts: Sequence[Rollout],
    forms_of: Callable[[Rollout], Sequence[TemplateForm]],
    thinking: Thinking,
    opened: bool = False,
) -> Rows:
    """The rows of rollouts: every sampled id is in one of them, and no id that was given among these. ``forms_of`` a
    rollout are those of its teachers; ``opened``: the student's template begins turns with thinking."""
    found = Rows([], [], [])
    for number, rollout in enumerate(rollouts):
        written = _written(rollout, opened)
        cut = rollout.thinking_cut
        pieces = pieces_of(written, forms_of(rollout), thinking, cut) if written is not None else None
        if written is None or pieces is None:
            found.compared.append(rollout)
            found.numbers.append(number)
            continue
        at = 0
        for piece in pieces:
            first, last = _tokens(rollout, written, piece)
            stopped = rollout.stopped and piece.ends
            if last <= first and not stopped:
                continue
            found.others.extend(_sampled(rollout, at, first))
            found.numbers.append(number)
            found.compared.append(
                _begun(_slice(rollout, first, last, stopped), rollout, written, piece, first)
            )
            at = last + stopped
        if at < rollout.ids.size:
            found.others.extend(_sampled(rollout, at, rollout.tokenized.ids.size, rollout.stopped))
    return found


def _sampled(rollout: Rollout, first: int, last: int, stopped: bool = False) -> list[Rollout]:
    """The sampled ones of some of a rollout's tokens, and its stop id if they ``stopped``, each stretch as a row."""
    found = []
    for start, end, sampled in rollout.segments:
        start, end = max(start, first), min(end, last)
        ends = stopped and end == last
        if sampled and (end > start or (ends and end == start)):
            found.append(_slice(rollout, start, end, ends))
    return found


def _written(rollout: Rollout, opened: bool) -> Written | None:
    """What the student wrote in a rollout; None if it did not, or if the rollout continues a plain text."""
    if not rollout.sampled or rollout.prompt.messages is None:
        return None
    if rollout.turn is not None:
        return rollout.turn.written
    written = read_turn(rollout.tokenized.data, opened=opened)
    has_tools = isinstance(rollout.prompt, TurnPrompt) and rollout.prompt.tools
    return written if has_tools else written.without_calls


def _tokens(rollout: Rollout, written: Written, piece: Piece) -> tuple[int, int]:
    """The range of the tokens inside a piece."""
    tokenized = rollout.tokenized
    first = int(np.searchsorted(tokenized.starts, written.byte_offset(piece.start), side="left"))
    last = tokenized.ids.size
    if not piece.ends:
        last = int(np.searchsorted(tokenized.ends, written.byte_offset(piece.end), side="right"))
    for start, end, sampled in rollout.segments if rollout.thinking_cut else ():
        if not sampled and first < start:
            last = min(last, start)
        elif not sampled:
            first = max(first, end)
    return first, last


def _begun(row: Rollout, rollout: Rollout, written: Written, piece: Piece, first: int) -> Rollout:
    """The row of a piece, after the beginning of the turn in each side's own form."""
    if piece.begun is None:
        return row
    tokenized = rollout.tokenized
    at = int(tokenized.starts[first]) if first < tokenized.ids.size else len(tokenized.data)
    lead = tokenized.data[written.byte_offset(piece.start) : at].decode("utf-8", "replace")
    return replace(row, prompt=replace(as_turn(rollout.prompt), begun=piece.begun, lead=lead))


def _slice(rollout: Rollout, first: int, last: int, stopped: bool = False) -> Rollout:
    """Some of a rollout's tokens, and its stop id if they ``stopped``, after those before them."""
    ids = rollout.ids[first : last + stopped]
    return replace(
        rollout,
        prompt=replace(as_turn(rollout.prompt), begun={"role": "assistant", "content": CUT})
        if first
        else rollout.prompt,
        prompt_ids=(*rollout.prompt_ids, *rollout.ids[:first].tolist()),
        ids=ids,
        sampling_logprobs=rollout.sampling_logprobs[first : last + stopped],
        tokenized=_part(rollout.tokenized, first, last),
        stopped=stopped,
        segments=(Segment(0, ids.size, True),),
    )


def _part(tokenized: TokenizedText, first: int, last: int) -> TokenizedText:
    """Some tokens of a text as a text."""
    if last <= first:
        return TokenizedText(tokenized.ids[:0], tokenized.ends[:0], b"", tokenized.exact[:0], 0)
    start, end = int(tokenized.starts[first]), int(tokenized.ends[last - 1])
    return TokenizedText(
        tokenized.ids[first:last],
        tokenized.ends[first:last] - start,
        tokenized.data[start:end],
        tokenized.exact[first:last],
        tokenized.repaired_bytes if last - first == tokenized.ids.size else 0,
    )
