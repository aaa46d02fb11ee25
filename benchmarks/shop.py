"""What the tasks of `python -m benchmarks turns` share: a shop's questions, lessons with and without mistakes, a pair.

A question is `36 of 4729`: a tool tells the price of item 4729, another multiplies, and the last turn is the product.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gold.data import Prompt
from gold.demo.models import tiny_model
from gold.demo.talk import STUDENT_TEMPLATE, TEACHER_TEMPLATE, pair_tokenizer, with_template
from gold.environments.calling import Caller
from gold.environments.protocol import Conversation
from gold.environments.tools import ToolEnvironment
from gold.errors import ConfigError
from gold.models.language_model import LanguageModel
from gold.turns import CUT, TurnMessage, TurnPrompt, read_turn

ITEMS = 1200
"""The items of the catalogue, among the numbers of four digits."""


def catalogue() -> dict[int, int]:
    """The price of each item."""
    rng = np.random.default_rng(5)
    numbers = rng.choice(np.arange(1000, 10000), ITEMS, replace=False).tolist()
    return dict(zip(numbers, rng.integers(11, 100, ITEMS).tolist(), strict=True))


PRICES = catalogue()


class Shop(ToolEnvironment):
    """The product of a count and the price of an item; ``repairs``: whether a conversation goes on after a call that
    fails, so that it can be repeated, or ends there."""

    name = "shop"
    items: Sequence[int] = tuple(PRICES)

    def __init__(self, tools: Sequence[Any], repairs: bool = True) -> None:
        super().__init__(tools)
        self.repairs = repairs

    @abstractmethod
    def asked_with(self, item: int) -> dict[str, int]:
        """The arguments of the call that tells an item's price."""

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different questions; no item is in both splits, for any seeds.

        Raises:
            ConfigError: an unknown split, or more questions than can be found.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"{self.name}: unknown split {split!r}; choose train or heldout")
        held = split == "heldout"
        items = [item for item in self.items if (zlib.crc32(str(item).encode()) % 4 == 0) is held]
        return self.questions(items, count, np.random.default_rng((seed, int(held))))

    def known(self, count: int, seed: int) -> list[Prompt]:
        """The questions from which a teacher learns."""
        return self.prompts("train", count, seed)

    def questions(self, items: Sequence[int], count: int, rng: np.random.Generator) -> list[Prompt]:
        """``count`` different questions about such items."""
        found: dict[str, Prompt] = {}
        for _ in range(20 * count + 100):
            number, item = int(rng.integers(11, 100)), int(rng.choice(items))
            text = f"{number} of {item}"
            message = {"role": "user", "content": text}
            found.setdefault(text, Prompt(text, messages=(message,), reference=[number, item]))
            if len(found) == count:
                return list(found.values())
        raise ConfigError(f"{self.name}: there are no {count} different questions; ask for fewer")

    async def reply(self, conversation: Conversation) -> list[TurnMessage] | None:
        """See ``Environment.reply``."""
        before = conversation.counts["tool_errors"]
        found = await super().reply(conversation)
        failed = conversation.counts["tool_errors"] > before
        return None if failed and not self.repairs else found

    def score(self, conversation: Conversation) -> float:
        """1 if the last turn is the product, and its price was asked for, else 0."""
        number, item = conversation.prompt.reference
        asked = any(
            call.name == "price" and dict(call.arguments) == self.asked_with(item)
            for turn in conversation.turns
            for call in turn.calls
        )
        right = conversation.ended == "done" and conversation.answer.strip() == str(number * PRICES[item])
        return float(asked and right)

    def texts(self, number: int, item: int, cost: int) -> tuple[str, str, str]:
        """The three turns of a conversation without mistakes, in which the item has this price."""
        return (
            call_text("price", **self.asked_with(item)),
            call_text("multiply", a=cost, b=number),
            str(number * cost),
        )

    def failing(self, right: str, rng: np.random.Generator) -> str:
        """A call that fails, made from a right one."""
        return broken(right, rng)


def call_text(name: str, **arguments: object) -> str:
    """A tool call as both templates write it."""
    written = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>{{"name": "{name}", "arguments": {{{written}}}}}</tool_call>'


@dataclass
class Played:
    """A conversation in which given turns are played, answered by the environment."""

    prompt: Prompt
    task: Shop
    caller: Caller
    seen: Conversation = field(init=False)

    def __post_init__(self) -> None:
        self.seen = Conversation(self.prompt, [dict(message) for message in self.prompt.messages or ()])

    def play(self, text: str) -> None:
        """Adds a turn and the environment's answer."""
        written = read_turn(text.encode())
        self.seen.turns.append(written)
        self.seen.messages.append(written.message())
        (answer,) = self.caller.results([partial(self.task.reply, self.seen)])
        if isinstance(answer, BaseException):
            raise answer
        self.seen.messages += answer or []

    def turn(self, text: str, written: str = "") -> TurnPrompt:
        """The next turn as a prompt, with ``text`` as its completion after what is ``written`` of it already."""
        return TurnPrompt(
            f"{self.prompt.key} {len(self.seen.turns)} {written} {text}",
            messages=tuple(dict(message) for message in self.seen.messages),
            completion=text,
            reference=self.prompt.reference,
            tools=self.task.tools,
            given=1,
            begun={"role": "assistant", "content": written + CUT} if written else None,
        )


def right_turns(task: Shop, prompts: Sequence[Prompt]) -> list[TurnPrompt]:
    """The turns of conversations without mistakes."""
    return list(_turns(task, prompts, None))


def mended_turns(task: Shop, prompts: Sequence[Prompt], seed: int, share: float = 0.4) -> list[TurnPrompt]:
    """The turns of conversations with mistakes in that ``share`` of the turns: calls that fail, before the right one;
    calls and digits that are wrong, and what follows them. The mistakes themselves are context, never completions."""
    return list(_turns(task, prompts, np.random.default_rng(seed), share))


def _turns(
    task: Shop, prompts: Sequence[Prompt], rng: np.random.Generator | None, share: float = 0.0
) -> Iterator[TurnPrompt]:
    caller = Caller(10.0)
    for prompt in prompts:
        played = Played(prompt, task, caller)
        number, item = prompt.reference
        cost, failures = PRICES[item], 0
        for place in range(3):
            right = task.texts(number, item, cost)[place]
            while rng is not None and place < 2 and failures < 2 and rng.random() < share:
                played.play(task.failing(right, rng))
                failures += 1
            yield played.turn(right)
            if rng is not None and rng.random() < share:
                yield played.turn(*slipped(right, rng))
            if rng is not None and place == 0 and rng.random() < share / 4:
                # Another item that there is: its price is what the conversation goes on with.
                item = int(rng.choice(list(task.items)))
                cost = PRICES[item]
                right = task.texts(number, item, cost)[0]
            elif rng is not None and place == 1 and rng.random() < share / 4:
                cost = int(rng.integers(11, 100))
                right = call_text("multiply", a=cost, b=number)
            played.play(right)
    caller.close()


def broken(right: str, rng: np.random.Generator) -> str:
    """A call that no tool takes, made from a right one: its first argument, or its form, is wrong."""
    digits = [at for at, c in enumerate(right.split(', "store"')[0]) if c.isdigit()]
    at = int(rng.choice(digits))
    kind = rng.choice(["digit", "digit", "less", "more", "none", "end", "key", "twice", "text"])
    if kind == "digit" and '"item"' in right:
        while True:
            other = right[:at] + str(rng.integers(0, 10)) + right[at + 1 :]
            number = int(other[digits[0] : digits[-1] + 1])
            if number not in PRICES:
                return other
    if kind == "less" and '"item"' in right:
        return right[:at] + right[at + 1 :]
    if kind == "more" and '"item"' in right:
        return right[:at] + str(rng.integers(0, 10)) + right[at:]
    if kind == "none":
        return right[: digits[0]] + right[digits[-1] + 1 :]
    if kind == "key":
        return right.replace('"item"', '"a"') if '"item"' in right else right.replace('"a"', '"item"')
    if kind == "twice":
        return right.replace("}}", ', "b": "}}', 1)
    if kind == "text":
        return right[: digits[-1] + 1].replace("</tool_call>", "")
    return right[: int(rng.integers(12, len(right) - 14))]


def slipped(right: str, rng: np.random.Generator) -> tuple[str, str]:
    """What follows a wrong digit in a turn, and the turn up to it."""
    digits = [at for at, c in enumerate(right) if c.isdigit()]
    at = int(rng.choice(digits))
    return right[at + 1 :], right[:at] + str((int(right[at]) + int(rng.integers(1, 10))) % 10)


def _texts(task: Shop) -> list[str]:
    turns = mended_turns(task, task.prompts("train", 60, 3), 3)
    asked = [message["content"] for turn in turns for message in turn.messages or ()]
    return [*asked, *(turn.completion or "" for turn in turns), "assistant\n", "tool\n", "user\n"]


def student(task: Shop, seed: int = 1, **sizes: Any) -> LanguageModel:
    """Random weights; its tokens are phrases and digits."""
    tokenizer = pair_tokenizer(_texts(task), 440, phrases=True)
    model = tiny_model(tokenizer, "student", seed=seed, **{"layers": 2, "context": 512, **sizes})
    return with_template(model, STUDENT_TEMPLATE)


def teacher(task: Shop, seed: int = 2, **sizes: Any) -> LanguageModel:
    """Random weights; its tokens are shorter phrases, and digits."""
    tokenizer = pair_tokenizer(_texts(task), 340, phrases=True)
    model = tiny_model(tokenizer, "teacher", seed=seed, **{"layers": 3, "context": 768, **sizes})
    return with_template(model, TEACHER_TEMPLATE)
