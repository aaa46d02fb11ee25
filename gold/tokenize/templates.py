"""Chat templates, rendered as in transformers but without importing it, and a tokenizer with its template.

The prompts of all tokenizers are rendered here, those of transformers included: `gold doctor` and `gold align` show
exactly the prompts of a run, and a run fixes the date that a template writes. `roles` renders a conversation of its own
once more, to see which token ends a turn; both run templates in `sandbox`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from gold.errors import ConfigError, DataError
from gold.files import read_json
from gold.tokenize.roles import default_template, token_content
from gold.tokenize.vocabulary import Vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_TAKEN = {
    *("messages", "tools", "documents", "add_generation_prompt", "conversation", "chat_template", "tokenize"),
    *("continue_final_message", "return_dict", "padding", "truncation", "max_length", "return_tensors"),
    *("strftime_now", "raise_exception", "namespace", "dict", "range", "lipsum", "cycler", "joiner"),
    *("additional_special_tokens", "extra_special_tokens", *_NAMED),
}
"""Names that templates already know, or options of transformers that are not passed to them."""


@dataclass(eq=False)
class Rendering:
    """The inputs of a chat template besides the messages.

    ``arguments`` are variables of the template, such as ``enable_thinking``. ``day`` is the date for templates that
    print one; None: today. A run fixes it at its start (`pin_day`).

    Raises: ConfigError for arguments that cannot be passed to a template.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None

    def __post_init__(self) -> None:
        check_arguments(self.arguments)

    def pin_day(self, day: date) -> None:
        """Uses this date in every later rendering."""
        self.day = day


def check_arguments(arguments: object) -> None:
    """Rejects arguments that cannot be passed to a chat template: reserved names, values that are not JSON.

    Raises: ConfigError that names the first of them.
    """
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"template_kwargs: expected names and values, got {type(arguments).__name__}")
    for name, value in arguments.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
            raise ConfigError(f"template_kwargs: {name!r} is no name that a template can ask for")
        if name in _TAKEN:
            raise ConfigError(f"template_kwargs.{name}: is given by gold itself; leave it out")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"template_kwargs.{name}: expected text, a number, true, false, null, or lists and mappings of them, "
                f"got {type(value).__name__}"
            ) from None


def template_of(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer, the default one if it has several; None without one."""
    return default_template(getattr(tokenizer, "chat_template", None))


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    rendering: Rendering | None = None,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The messages rendered with the tokenizer's chat template; ``tools`` are JSON schemas of functions.

    Raises: DataError if the template rejects them.
    """
    from gold.tokenize.sandbox import compiled_template

    rendering = rendering or Rendering()
    now = datetime.now() if rendering.day is None else datetime.combine(rendering.day, time())
    try:
        return compiled_template(template_of(tokenizer) or "").render(
            messages=[dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: now.strftime(form),
            **{**tokenizer.special_tokens_map, **rendering.arguments},
        )
    except Exception as error:  # Jinja's errors, and any exception that the template raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the model's chat template refuses the messages: {reason}") from error


class PromptTokenizer:
    """The part of the interface of a Hugging Face tokenizer that `gold.tokenize.chat` needs.

    `settings` are those of a folder in Hugging Face format: the strings of special tokens, and whether texts begin with
    BOS. Without them, the strings come from the vocabulary's roles.
    """

    def __init__(self, vocabulary: Vocabulary, settings: Mapping[str, Any] | None = None) -> None:
        self.chat_template = vocabulary.chat_template
        self.backend_tokenizer = vocabulary.tokenizer
        self._size: int = vocabulary.tokenizer.get_vocab_size()  # slow: visits the whole vocabulary
        self.bos_token_id, self.unk_token_id = vocabulary.bos_id, vocabulary.unk_id
        if settings is None:
            eos = (*vocabulary.stop_ids, None)[0]
            roles = {"bos_token": vocabulary.bos_id, "eos_token": eos, "pad_token": vocabulary.pad_id}
            settings = {name: vocabulary.label(i) for name, i in roles.items() if i is not None}
        self.add_bos_token = settings.get("add_bos_token")
        self.model_max_length = settings.get("model_max_length")
        named = {name: token_content(settings.get(name)) for name in _NAMED}
        self.special_tokens_map = {name: token for name, token in named.items() if token is not None}

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "PromptTokenizer":
        """The tokenizer of a vocabulary, with the settings of the folder it was loaded from.

        Raises: DataError for a file that cannot be read.
        """
        files = [Path(vocabulary.name) / f for f in ("special_tokens_map.json", "tokenizer_config.json")]
        contents = [read_json(file, DataError) for file in files if file.exists()]
        if not contents:
            return cls(vocabulary)
        return cls(vocabulary, {k: v for c in contents if isinstance(c, dict) for k, v in c.items()})

    def __len__(self) -> int:
        return self._size

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        added: dict[int, AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    @property
    def all_special_tokens(self) -> list[str]:
        """The strings of the tokens that have a role."""
        return [t for t in self.special_tokens_map.values() if self.convert_tokens_to_ids(t) is not None]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; None if there is no such token."""
        index: int | None = self.backend_tokenizer.token_to_id(token)
        return index

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """The ids of a text; `split_special_tokens`: strings of special tokens are text."""
        backend = self.backend_tokenizer
        before, backend.encode_special_tokens = backend.encode_special_tokens, split_special_tokens
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        finally:
            backend.encode_special_tokens = before
        return ids
