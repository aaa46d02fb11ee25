"""A conversation with several models at once: each answers the same user, after its own earlier answers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gold import terminal
from gold.data import Message, Prompt
from gold.errors import DataError, GoldError
from gold.models.language_model import LanguageModel
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.tokenize.chat import has_chat_template

HELP = "/reset begins anew, /help shows this, /quit or Ctrl-D ends; Ctrl-C stops an answer"
_SIDE_BY_SIDE = 36
"""Columns that an answer needs to stand beside others."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote; ``stopped`` is false where it was cut off at the most tokens allowed."""

    text: str
    tokens: int
    stopped: bool
    seconds: float


@dataclass
class Chat:
    """The conversations of some models, by name.

    ``plain``: every prompt is a text to continue, alone, without templates or earlier turns.
    """

    models: Mapping[str, LanguageModel]
    sampling: Sampling
    seed: int = 0
    plain: bool = False
    system: str | None = None
    turns: dict[str, list[Message]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.turns = {name: list(head) for name in self.models}

    def ask(self, text: str, tell: Callable[[str], None] = lambda name: None) -> dict[str, Answer]:
        """Every model's answer; ``tell(name)`` is called before each. If one fails, the turn does not count.

        Raises: DataError for a conversation that leaves no room in a model's context, or that a template refuses.
        """
        answers = {}
        for name, model in self.models.items():
            tell(name)
            messages: list[Message] = [*self.turns[name], {"role": "user", "content": text}]
            prompt = Prompt("chat", text=text) if self.plain else Prompt("chat", messages=tuple(messages))
            started = time.perf_counter()
            try:
                (drawn,) = sample(
                    HuggingFaceEngine(model),
                    model,
                    [prompt],
                    self.sampling,
                    seeds=[(self.seed, self.count)],
                )
            except DataError as error:
                raise DataError(
                    f"{name}: {str(error).removeprefix('prompt chat: ')}; /reset begins anew"
                ) from error
            seconds = time.perf_counter() - started
            answers[name] = Answer(drawn.text, int(drawn.ids.size), drawn.stopped, seconds)
        for name, answer in answers.items():
            self.turns[name] += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer.text},
            ]
        self.count += 1
        return answers


def needs_plain(models: Mapping[str, LanguageModel]) -> bool:
    """Whether the first model, the student, has no chat template to be talked to with."""
    return not has_chat_template(next(iter(models.values())).tokenizer)


def talk(chat: Chat) -> None:
    """Reads prompts from stdin and prints the answers, until its end, `/quit`, or Ctrl-C at the prompt."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (history and editing for input())
        kind = "continue a text" if chat.plain else "talk"
        terminal.show(f"{kind} with {', '.join(chat.models)}; {HELP}")
    while True:
        try:
            line = input("> ") if interactive else input()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                terminal.show("")
            return
        text = line if chat.plain else line.strip()
        if line.strip() == "/quit":
            return
        if line.strip() == "/help":
            terminal.show(HELP)
        elif line.strip() == "/reset":
            chat.reset()
            terminal.show("a new conversation")
        elif text.strip():
            _turn(chat, text, interactive)


def _turn(chat: Chat, text: str, interactive: bool) -> None:
    """One turn of `talk`; a failure or Ctrl-C ends only the turn."""

    def waiting(name: str) -> None:
        if interactive:
            terminal.show(f"… {name}", stream=sys.stderr)

    try:
        show_answers(chat.ask(text, waiting))
    except GoldError as error:
        terminal.show_error(error)
    except KeyboardInterrupt:
        if not interactive:
            raise
        terminal.show("", "stopped; the turn does not count")


def show_answers(answers: Mapping[str, Answer]) -> None:
    """Prints the answers: beside each other where the terminal is wide enough, else below each other."""
    console = terminal.new_console()
    if len(answers) > 1 and console.is_terminal and console.width >= _SIDE_BY_SIDE * len(answers):
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        for name, answer in answers.items():
            table.add_column(Text(_title(name, answer)), ratio=1, overflow="fold")
        table.add_row(*(Text(terminal.lines(answer.text)) for answer in answers.values()))
        console.print(table)
        return
    for name, answer in answers.items():
        terminal.show(f"[{_title(name, answer)}]")
        terminal.show_lines(answer.text)


def _title(name: str, answer: Answer) -> str:
    cut = "" if answer.stopped else ", cut off"
    return f"{name}, {answer.tokens} tokens in {answer.seconds:.1f} s{cut}"


def run_chat(chat: Chat, prompts: Sequence[str], as_json: bool = False) -> None:
    """Asks the prompts in turn and prints the answers; without prompts, talks.

    Raises: DataError for a prompt that a model cannot answer.
    """
    for prompt in prompts:
        answers = chat.ask(prompt)
        if as_json:
            told = {
                name: {"text": a.text, "tokens": a.tokens, "stopped": a.stopped}
                for name, a in answers.items()
            }
            terminal.show_json({"prompt": prompt, "answers": told})
        else:
            show_answers(answers)
    if not prompts:
        talk(chat)
