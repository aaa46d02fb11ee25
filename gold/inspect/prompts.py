"""`gold data`: what was read of a source of prompts, how long the prompts are, and what each model reads of some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gold import terminal
from gold.data import MOST_EXAMINED, Prompt, PromptFile, any_messages, examined, lacking_completion
from gold.doctor.side import Side
from gold.errors import DataError
from gold.inspect.view import id_runs, visible
from gold.tokenize.chat import starts_text

_SIDE_BY_SIDE = 36
"""Columns that a model's reading needs to stand beside others."""
_HEAD, _TAIL = 160, 80
"""Tokens shown at the beginning and at the end of a longer text."""
_STYLES = {"text": "", "mark": "dim", "event": "magenta"}

Runs = list[tuple[str, str]]


@dataclass(frozen=True)
class Reader:
    """A model that reads prompts: its side, the prompts as it sees them, and which of them it reads."""

    name: str
    side: Side
    adapt: Callable[[Prompt], Prompt] = field(default=lambda prompt: prompt)
    reads: Callable[[Prompt], bool] = field(default=lambda prompt: True)

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, as in a run.

        Raises: DataError if its tokenizer or template rejects the prompt.
        """
        return self.side.prompt_ids(self.adapt(prompt))

    def answer_ids(self, prompt: Prompt) -> list[int]:
        """The ids of the prompt's completion."""
        tokenized = self.side.marked.encode(prompt.completion or "", at_start=starts_text(prompt))
        return [int(index) for index in tokenized.ids]


@dataclass(frozen=True)
class Source:
    """Prompts with the word for what they are, and what is known of where they were read from."""

    what: str
    prompts: Sequence[Prompt]

    @property
    def lines(self) -> Iterator[str]:
        """The facts: format, rows, columns, completions."""
        prompts, facts = self.prompts, self.prompts.facts if isinstance(self.prompts, PromptFile) else None
        if facts is None:
            yield f"{self.what}: {len(prompts):,} prompts of a task"
        else:
            kinds = ", ".join(f"{count:,} of {name}" for name, count in facts.kinds.items())
            yield f"{facts.name}: {facts.format}, {facts.rows:,} rows, {kinds}"
            yield f"columns read: {', '.join(facts.used)}"
            if facts.ignored:
                yield (
                    facts.notes[0].partition(": ")[2].replace("columns that are not read", "columns not read")
                )
            if facts.revision:
                yield f"revision: {facts.revision}"
        lacking = len(lacking_completion(prompts))
        without = f", {lacking:,} without" if lacking else ""
        yield f"completions: {len(prompts) - lacking:,} prompts with one{without}"
        if facts is not None and facts.blank_answers:
            yield facts.notes[-1].partition(": ")[2]


def lengths(prompts: Sequence[Prompt], readers: Sequence[Reader]) -> dict[str, dict[str, Any]]:
    """For each model the tokens of prompts and of completions: least, median, 90th percentile, most; of very many
    prompts, those of ``examined``. ``refused``: prompts that it cannot read."""
    chosen = examined(prompts)
    found: dict[str, dict[str, Any]] = {}
    for reader in readers:
        sizes: dict[str, list[int]] = {"prompt": [], "completion": []}
        refused = 0
        for prompt in filter(reader.reads, chosen):
            try:
                sizes["prompt"].append(len(reader.ids(prompt)))
            except DataError:
                refused += 1
            if prompt.completion is not None:
                sizes["completion"].append(len(reader.answer_ids(prompt)))
        found[reader.name] = {
            **{what: _spread(given) for what, given in sizes.items() if given},
            "refused": refused,
            "context": reader.side.context,
        }
    return found


def _spread(sizes: list[int]) -> dict[str, int]:
    low, middle, high, most = np.percentile(sizes, [0, 50, 90, 100], method="nearest").tolist()
    return {"least": int(low), "median": int(middle), "p90": int(high), "most": int(most)}


def show_data(sources: Sequence[Source], readers: Sequence[Reader], rows: int) -> None:
    """Prints the facts of each source, the lengths of its prompts, and the first ``rows`` of the first as every model
    reads them: beside each other where there is room, else below each other."""
    console = terminal.new_console()
    for source in sources:
        for number, line in enumerate(source.lines):
            console.print(line if number == 0 else f"  {line}", soft_wrap=not console.is_terminal)
        if readers:
            _show_lengths(source.prompts, readers, console)
    prompts = sources[0].prompts
    for place in range(min(rows, len(prompts))):
        _show_row(place, prompts[place], readers, console)


def _show_lengths(prompts: Sequence[Prompt], readers: Sequence[Reader], console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    for header in ("tokens", "", "least", "median", "90 %", "most"):
        table.add_column(header, justify="left" if header in ("tokens", "") else "right", overflow="fold")
    notes = []
    for name, found in lengths(prompts, readers).items():
        for what in ("prompt", "completion"):
            if what in found:
                table.add_row(name, f"{what}s", *(f"{size:,}" for size in found[what].values()))
        if found["refused"]:
            notes.append(f"  {found['refused']:,} prompts cannot be read by {name}: gold doctor says why")
        if found["context"] and found.get("prompt", {}).get("most", 0) >= found["context"]:
            notes.append(f"  the longest prompt fills the context of {name}: {found['context']:,} tokens")
    console.print(table)
    if len(prompts) > MOST_EXAMINED:
        notes.append(f"  of {MOST_EXAMINED:,} prompts drawn with a fixed seed, and the longest")
    for note in notes:
        console.print(note, style="dim")


def _show_row(place: int, prompt: Prompt, readers: Sequence[Reader], console: Any) -> None:
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console.print(Rule(Text(terminal.line(f"row {place + 1}, {prompt.key}")), align="left", style="dim"))
    given = [reader for reader in readers if reader.reads(prompt)]
    if not given:
        console.print(_text(_plain(prompt)))
        return
    cells = [(Text(f"{reader.name} reads", "bold"), _text(_reading(reader, prompt))) for reader in given]
    if len(cells) > 1 and console.width >= _SIDE_BY_SIDE * len(cells):
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        for title, _ in cells:
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(*(cell for _, cell in cells))
        console.print(table)
    else:
        for title, cell in cells:
            console.print(title)
            console.print(cell)
    if prompt.reference is not None:
        console.print(Text(f"reference  {terminal.line(repr(prompt.reference))[:200]}", "dim"))


def _plain(prompt: Prompt) -> Runs:
    """A prompt without a model: its text, or its turns by role."""
    runs: Runs = []
    if prompt.messages is None:
        runs += _visible(prompt.text or "")
    for message in prompt.messages or ():
        runs += [(f"{message['role']}  ", "event"), *_visible(message["content"]), ("\n", "text")]
    if prompt.completion is not None:
        runs += [("\n" if prompt.messages is None else "", "text"), ("completion  ", "event")]
        runs += _visible(prompt.completion)
    return runs


def _reading(reader: Reader, prompt: Prompt) -> Runs:
    """What a model reads, then the completion after a line of its own."""
    vocabulary = reader.side.marked
    try:
        runs = _cut(reader.ids(prompt), vocabulary)
    except DataError as error:
        runs = [(f"cannot read it: {error}", "event")]
    if prompt.completion is not None:
        runs += [("\ncompletion\n", "mark"), *_cut(reader.answer_ids(prompt), vocabulary)]
    return runs


def _cut(ids: list[int], vocabulary: Any) -> Runs:
    if len(ids) <= _HEAD + _TAIL:
        return list(id_runs(vocabulary, ids))
    left = len(ids) - _HEAD - _TAIL
    head, tail = id_runs(vocabulary, ids[:_HEAD]), id_runs(vocabulary, ids[-_TAIL:])
    return [*head, (f" ⋯ {left:,} tokens ⋯ ", "mark"), *tail]


def _visible(text: str) -> Runs:
    shown = text if len(text) <= 1200 else f"{text[:800]} ⋯ {len(text) - 1200:,} characters ⋯ {text[-400:]}"
    runs: Runs = []
    for words in shown.split(" "):
        runs += [(" ", "text")] if runs else []
        runs += [
            (r.replace("⏎", "⏎\n"), "mark") if m else (r, "text") for r, m in visible(words.encode("utf-8"))
        ]
    return runs


def _text(runs: Runs) -> Any:
    from rich.text import Text

    return Text.assemble(*((terminal.lines(run), _STYLES[kind]) for run, kind in runs))


def data_json(sources: Sequence[Source], readers: Sequence[Reader], rows: int) -> dict[str, Any]:
    """The same as one JSON object."""
    prompts = sources[0].prompts
    return {
        "sources": [_source_json(source, readers) for source in sources],
        "rows": [_row_json(prompts[i], readers) for i in range(min(rows, len(prompts)))],
    }


def _source_json(source: Source, readers: Sequence[Reader]) -> dict[str, Any]:
    prompts, facts = source.prompts, source.prompts.facts if isinstance(source.prompts, PromptFile) else None
    return {
        "prompts": source.what,
        "name": facts.name if facts else None,
        "format": facts.format if facts else "task",
        "rows": len(prompts),
        "kinds": dict(facts.kinds) if facts else {},
        "read": list(facts.used) if facts else [],
        "not_read": list(facts.ignored) if facts else [],
        "revision": facts.revision if facts else None,
        "conversations": any_messages(prompts),
        "completions": len(prompts) - len(lacking_completion(prompts)),
        "tokens": lengths(prompts, readers),
    }


def _row_json(prompt: Prompt, readers: Sequence[Reader]) -> dict[str, Any]:
    reads: dict[str, Mapping[str, Any]] = {}
    for reader in readers:
        if not reader.reads(prompt):
            continue
        try:
            ids = reader.ids(prompt)
        except DataError as error:
            reads[reader.name] = {"error": str(error)}
            continue
        runs = id_runs(reader.side.marked, ids)
        reads[reader.name] = {"text": "".join(run for run, _ in runs), "ids": ids}
    return {
        "key": prompt.key,
        "prompt": prompt.text,
        "messages": prompt.messages,
        "completion": prompt.completion,
        "reference": prompt.reference,
        "teacher_context": prompt.teacher_context,
        "reads": reads,
    }
