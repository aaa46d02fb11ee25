"""A task of dependent tool calls, and a tiny pair for it whose teacher has seen calls that fail.

A question is `36 of 4729`: the tool `price` tells what item 4729 costs, `multiply` computes the product, and the last
turn is the product. Only some numbers are of items, so that a digit copied wrongly is mostly an error of the tool,
after which the call can be repeated. A model needs the right next turn after states that its own mistakes lead to.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gold.data import Prompt
from gold.demo.calculator import multiply
from gold.demo.models import SPECIAL, tiny_model
from gold.demo.talk import STUDENT_TEMPLATE, TEACHER_TEMPLATE, with_template
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


def price(item: int) -> int:
    """Tells the price of an item.

    Args:
        item: The number of the item.
    """
    found = PRICES.get(int(item))
    if found is None:
        raise LookupError("no such item")
    return found


class Orders(ToolEnvironment):
    """The product of a count and the price of an item; ``repairs``: whether a conversation goes on after a call that
    fails, so that it can be repeated, or ends there."""

    name = "orders"

    def __init__(self, repairs: bool = True) -> None:
        super().__init__([price, multiply])
        self.repairs = repairs

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different questions; no item is in both splits, for any seeds.

        Raises:
            ConfigError: an unknown split, or more questions than can be found.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"orders: unknown split {split!r}; choose train or heldout")
        held = split == "heldout"
        items = [item for item in PRICES if (zlib.crc32(str(item).encode()) % 4 == 0) is held]
        rng = np.random.default_rng((seed, int(held)))
        found: dict[str, Prompt] = {}
        for _ in range(20 * count + 100):
            number, item = int(rng.integers(11, 100)), int(rng.choice(items))
            text = f"{number} of {item}"
            message = {"role": "user", "content": text}
            found.setdefault(text, Prompt(text, messages=(message,), reference=[number, item]))
            if len(found) == count:
                return list(found.values())
        raise ConfigError(f"orders: there are no {count} different {split} questions; ask for fewer")

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
            call.name == "price" and dict(call.arguments) == {"item": item}
            for turn in conversation.turns
            for call in turn.calls
        )
        right = conversation.ended == "done" and conversation.answer.strip() == str(number * PRICES[item])
        return float(asked and right)


def call_text(name: str, **arguments: object) -> str:
    """A tool call as both templates write it."""
    written = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>{{"name": "{name}", "arguments": {{{written}}}}}</tool_call>'


def right_texts(number: int, item: int, cost: int) -> tuple[str, str, str]:
    """The three turns of a conversation in which the item has this price."""
    return call_text("price", item=item), call_text("multiply", a=cost, b=number), str(number * cost)


@dataclass
class Played:
    """A conversation in which given turns are played, answered by the environment."""

    prompt: Prompt
    task: Orders
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


def right_turns(prompts: Sequence[Prompt]) -> list[TurnPrompt]:
    """The turns of conversations without mistakes."""
    return list(_turns(prompts, None))


def mended_turns(prompts: Sequence[Prompt], seed: int, share: float = 0.4) -> list[TurnPrompt]:
    """The turns of conversations with mistakes in that ``share`` of the turns: calls that fail, before the right one;
    calls and digits that are wrong, and what follows them. The mistakes themselves are context, never completions."""
    return list(_turns(prompts, np.random.default_rng(seed), share))


def _turns(
    prompts: Sequence[Prompt], rng: np.random.Generator | None, share: float = 0.0
) -> Iterator[TurnPrompt]:
    task, caller = Orders(), Caller(10.0)
    for prompt in prompts:
        played = Played(prompt, task, caller)
        number, item = prompt.reference
        cost, failures = PRICES[item], 0
        for place in range(3):
            right = right_texts(number, item, cost)[place]
            while rng is not None and place < 2 and failures < 2 and rng.random() < share:
                played.play(failing(right, rng))
                failures += 1
            yield played.turn(right)
            if rng is not None and rng.random() < share:
                yield played.turn(*slipped(right, rng))
            if rng is not None and place == 0 and rng.random() < share / 4:
                # Another item that there is: its price is what the conversation goes on with.
                item = int(rng.choice(list(PRICES)))
                cost, right = PRICES[item], call_text("price", item=item)
            elif rng is not None and place == 1 and rng.random() < share / 4:
                cost = int(rng.integers(11, 100))
                right = call_text("multiply", a=cost, b=number)
            played.play(right)
    caller.close()


def failing(right: str, rng: np.random.Generator) -> str:
    """A call that fails, made from a right one."""
    digits = [at for at, c in enumerate(right) if c.isdigit()]
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


def phrase_tokenizer(texts: Sequence[str], size: int = 440) -> Tokenizer:
    """Byte-level BPE of the texts without bounds between words: a phrase of a template is one token, a digit too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts() -> list[str]:
    prompts = Orders().prompts("train", 60, 3)
    turns = mended_turns(prompts, 3)
    asked = [message["content"] for turn in turns for message in turn.messages or ()]
    return [*asked, *(turn.completion or "" for turn in turns), "assistant\n", "tool\n", "user\n"]


def student(seed: int = 1, **sizes: Any) -> LanguageModel:
    """Random weights; its tokens are phrases and digits."""
    model = tiny_model(
        phrase_tokenizer(_texts()), "student", seed=seed, **{"layers": 2, "context": 512, **sizes}
    )
    return with_template(model, STUDENT_TEMPLATE)


def teacher(seed: int = 2, **sizes: Any) -> LanguageModel:
    """Random weights; its tokens are shorter phrases, and digits."""
    model = tiny_model(
        phrase_tokenizer(_texts(), 340), "teacher", seed=seed, **{"layers": 3, "context": 768, **sizes}
    )
    return with_template(model, TEACHER_TEMPLATE)
