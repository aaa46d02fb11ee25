"""One side of a pair from its files: vocabulary, special tokens, chat template, config.json; no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from gold.data import Prompt
from gold.errors import VocabularyError
from gold.files import ADAPTER_CONFIG, adapter_base, read_json_object
from gold.tokenize.chat import adds_bos, prompt_ids
from gold.tokenize.roles import Roles
from gold.tokenize.templates import PromptTokenizer, Rendering, rendered, template_of
from gold.tokenize.vocabulary import Vocabulary

_CONTEXT = (
    *("max_position_embeddings", "n_positions", "n_ctx"),
    *("seq_length", "max_seq_len", "max_sequence_length"),
)  # keys of the context length in config.json


@dataclass(frozen=True)
class Turn:
    """The text that a chat template writes around a question and its answer."""

    before: str
    """up to the question"""
    opening: str
    """from the question to the start of the answer (generation prompt)"""
    closing: str
    """after the answer"""


@dataclass(frozen=True)
class Side:
    """A tokenizer, and the model's settings in its folder.

    `tokenizer` has the interface that `gold.tokenize.chat` needs. `bare`: the source is a tokenizer file alone, which
    names no stop ids. `config` is the text model's part of config.json, empty if there is none; `folder` contains the
    files. `adapter`: the contents of adapter_config.json, if the source is a folder of adapters; all else is then of
    their base model.
    """

    role: str
    vocabulary: Vocabulary
    tokenizer: Any
    bare: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    rendering: Rendering = field(default_factory=Rendering)
    adapter: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The location of its files."""
        return self.vocabulary.name

    @property
    def template(self) -> str | None:
        """The chat template."""
        return template_of(self.tokenizer)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt."""
        return prompt_ids(self.tokenizer, prompt, self.rendering)

    @cached_property
    def added(self) -> Mapping[int, AddedToken]:
        """The added tokens, including special ones."""
        found: Mapping[int, AddedToken] = self.tokenizer.added_tokens_decoder
        return found

    @cached_property
    def puts_bos(self) -> bool:
        """True if the tokenizer puts its BOS before every text."""
        return adds_bos(self.tokenizer)

    @cached_property
    def turn(self) -> Turn | None:
        """What its chat template writes around an answer; None without one, or if it rejects a plain question."""
        if not self.template:
            return None
        question, answer = {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}
        try:
            asked = rendered(self.tokenizer, [question], self.rendering, add_generation_prompt=True)
            answered = rendered(self.tokenizer, [question, answer], self.rendering)
        except Exception:  # a template may raise any exception
            return None
        before, q, opening = asked.rpartition("Q1")
        _, a, closing = answered.rpartition("A1")
        return Turn(before, opening, closing) if q and a else None

    @cached_property
    def marked(self) -> Vocabulary:
        """The vocabulary as in a run, in which thinking and tool markers are text."""
        return self.vocabulary.with_markers(self.config.get("vocab_size"))

    @property
    def context(self) -> int | None:
        """The model's context length in tokens; None if config.json does not give it."""
        found = [self.config.get(name) for name in _CONTEXT]
        return next((n for n in found if isinstance(n, int) and n > 0), None)

    def kind(self, token: str) -> str:
        """How this side treats a string: as a "special token", another "added token", or "text"."""
        for added in self.added.values():
            if added.content == token:
                return "special token" if added.special else "added token"
        return "text"

    def tokens(self, ids: tuple[int, ...]) -> str:
        """The strings of special tokens, for display."""
        return " ".join(self.added[i].content if i in self.added else str(i) for i in ids) or "none"


def read_side(role: str, source: Any, roles: Roles | None = None, rendering: Rendering | None = None) -> Side:
    """The side of a folder, a tokenizer file, a Hub id or a Hugging Face tokenizer.

    Raises: VocabularyError if there is no such tokenizer, or its tokens are not bytes.
    """
    vocabulary = Vocabulary.load(source, roles=roles)
    live = hasattr(source, "apply_chat_template")
    folder = Path(vocabulary.name) if not live and Path(vocabulary.name).is_dir() else None
    adapter = None
    named = source if isinstance(source, str | Path) else ""
    if (base := adapter_base(named, VocabularyError)) is not None:
        adapter = read_json_object(Path(named).expanduser() / ADAPTER_CONFIG, VocabularyError)
        folder = Path(base) if Path(base).is_dir() else None
    config = _text_config(folder)
    if not vocabulary.stop_ids and (stops := config.get("eos_token_id")) is not None:
        # The fallback of transformers if the generation settings name none.
        vocabulary = Vocabulary.load(source, stops if isinstance(stops, list) else [stops], roles)
    tokenizer = source if live else PromptTokenizer.of(vocabulary)
    bare = folder is None and not live
    return Side(role, vocabulary, tokenizer, bare, config, folder, rendering or Rendering(), adapter)


def _text_config(folder: Path | None) -> Mapping[str, Any]:
    if folder is None or not (folder / "config.json").is_file():
        return {}
    content = read_json_object(folder / "config.json", VocabularyError)
    part = content.get("text_config")
    return part if isinstance(part, dict) else content
