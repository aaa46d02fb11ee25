"""One side of a pair as its files tell it: vocabulary, special tokens, chat template, config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from gold.data import Prompt
from gold.errors import VocabularyError
from gold.files import read_json_object
from gold.tokenize.chat import adds_bos, prompt_ids
from gold.tokenize.roles import Roles
from gold.tokenize.templates import PromptTokenizer, Rendering, rendered, template_of
from gold.tokenize.vocabulary import Vocabulary

_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "seq_length",
    "max_seq_len",
    "max_sequence_length",
)
"""What config.json calls the context."""


@dataclass(frozen=True)
class Turn:
    """What a chat template writes around a question and its answer."""

    before: str
    """up to the question"""
    opening: str
    """from the question to the place where an answer is asked for"""
    closing: str
    """after the answer"""


@dataclass(frozen=True)
class Side:
    """A tokenizer, and what stands beside it in its folder.

    `tokenizer` has the interface that `gold.tokenize.chat` needs. `bare`: the source is a tokenizer alone, which names
    no stop ids. `turn` is None without a template, and where it refuses a plain conversation. `config` is the part of
    config.json that describes the text model, empty where there is none; `folder` is where the files are.
    """

    role: str
    vocabulary: Vocabulary
    tokenizer: Any
    added: Mapping[int, AddedToken]
    bare: bool
    puts_bos: bool
    turn: Turn | None
    config: Mapping[str, Any]
    folder: Path | None
    rendering: Rendering = field(default_factory=Rendering)

    @property
    def name(self) -> str:
        """Where its files are."""
        return self.vocabulary.name

    @property
    def template(self) -> str | None:
        """The chat template."""
        return template_of(self.tokenizer)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that it reads before a completion."""
        return prompt_ids(self.tokenizer, prompt, self.rendering)

    @cached_property
    def marked(self) -> Vocabulary:
        """The vocabulary as a run has it, in which markers are the text that they look like."""
        return self.vocabulary.with_markers(self.config.get("vocab_size"))

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens that the model was built for, None where config.json does not say."""
        found = [self.config.get(name) for name in _CONTEXT]
        return next((n for n in found if isinstance(n, int) and n > 0), None)

    def kind(self, token: str) -> str:
        """What a string is to this side: a "special" token, another added "token", or plain "text"."""
        for added in self.added.values():
            if added.content == token:
                return "special" if added.special else "token"
        return "text"

    def tokens(self, ids: tuple[int, ...]) -> str:
        """Special tokens for people."""
        return " ".join(self.added[i].content if i in self.added else str(i) for i in ids) or "none"


def read_side(role: str, source: Any, roles: Roles | None = None, rendering: Rendering | None = None) -> Side:
    """The side that a folder, a tokenizer file, a Hub id or a Hugging Face tokenizer stands for.

    Raises: VocabularyError if there is no such tokenizer, or none that can be spelled in bytes.
    """
    vocabulary = Vocabulary.load(source, roles=roles)
    live = hasattr(source, "apply_chat_template")
    folder = Path(vocabulary.name) if not live and Path(vocabulary.name).is_dir() else None
    config = _config(folder)
    if not vocabulary.stop_ids and (stops := config.get("eos_token_id")) is not None:
        # What transformers takes for a model whose generation settings name none.
        vocabulary = Vocabulary.load(source, stops if isinstance(stops, list) else [stops], roles)
    tokenizer = source if live else PromptTokenizer.of(vocabulary)
    bare = folder is None and not live
    return side_of(role, vocabulary, tokenizer, bare=bare, config=config, folder=folder, rendering=rendering)


def side_of(
    role: str,
    vocabulary: Vocabulary,
    tokenizer: Any,
    *,
    bare: bool = False,
    config: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    rendering: Rendering | None = None,
) -> Side:
    """The side that a vocabulary and its tokenizer stand for."""
    return Side(
        role,
        vocabulary,
        tokenizer,
        tokenizer.added_tokens_decoder,
        bare,
        puts_bos=adds_bos(tokenizer),
        turn=_turn(tokenizer, rendering),
        rendering=rendering or Rendering(),
        config=config or {},
        folder=folder,
    )


def _turn(tokenizer: Any, rendering: Rendering | None) -> Turn | None:
    if not template_of(tokenizer):
        return None
    question, answer = {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}
    try:
        asked = rendered(tokenizer, [question], rendering, add_generation_prompt=True)
        answered = rendered(tokenizer, [question, answer], rendering)
    except Exception:  # a template is a program: it may raise anything
        return None
    before, q, opening = asked.rpartition("Q1")
    _, a, closing = answered.rpartition("A1")
    return Turn(before, opening, closing) if q and a else None


def _config(folder: Path | None) -> Mapping[str, Any]:
    if folder is None or not (folder / "config.json").is_file():
        return {}
    content = read_json_object(folder / "config.json", VocabularyError)
    part = content.get("text_config")
    return part if isinstance(part, dict) else content
