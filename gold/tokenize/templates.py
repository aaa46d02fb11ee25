"""Chat templates rendered as transformers renders them but without importing that, and a tokenizer with its template.

Every tokenizer's messages are rendered here, one of transformers' own too: whoever looks at a prompt sees what a run
reads, and what day it is for a template is decided by the run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from gold.errors import ConfigError, DataError
from gold.files import read_json
from gold.tokenize.sandbox import compiled_template

if TYPE_CHECKING:
    from gold.tokenize.vocabulary import Vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


_TAKEN = frozenset(
    (
        *(
            "messages",
            "tools",
            "documents",
            "add_generation_prompt",
            "conversation",
            "chat_template",
            "tokenize",
        ),
        *("continue_final_message", "return_dict", "padding", "truncation", "max_length", "return_tensors"),
        *("strftime_now", "raise_exception", "namespace", "dict", "range", "lipsum", "cycler", "joiner"),
        *("additional_special_tokens", "extra_special_tokens", *_NAMED),
    )
)
"""Names that a template knows already, or that are options of transformers and never reach it."""


@dataclass(eq=False)
class Rendering:
    """What a chat template is given beside the messages.

    ``arguments`` are names and values that the template asks for, such as ``enable_thinking``. ``day`` is the date that
    a template writes if it prints one; None: today's, which changes tomorrow. A run pins it at its start (`pin_day`).

    Raises: ConfigError for arguments that no template can be given.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None

    def __post_init__(self) -> None:
        check_arguments(self.arguments)

    def pin_day(self, day: date) -> None:
        """Every later rendering writes this day."""
        self.day = day


def check_arguments(arguments: object) -> None:
    """Nothing, where a chat template can be given these arguments: names that mean nothing else, and values of JSON.

    Raises: ConfigError that names the first that it cannot.
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
    """The chat template of a tokenizer, the default one where it has several; None without one."""
    from gold.tokenize.load import default_template  # it imports the readers of all formats

    return default_template(getattr(tokenizer, "chat_template", None)) or None


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    rendering: Rendering | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The messages as a tokenizer's chat template writes them.

    Raises: whatever the template raises; it is a program.
    """
    rendering = rendering or Rendering()
    now = datetime.now() if rendering.day is None else datetime.combine(rendering.day, time())
    text: str = compiled_template(template_of(tokenizer) or "").render(
        messages=[dict(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        strftime_now=lambda form: now.strftime(form),
        **{**tokenizer.special_tokens_map, **rendering.arguments},
    )
    return text


class PromptTokenizer:
    """As much of the interface of a Hugging Face tokenizer as `gold.tokenize.chat` needs of one.

    `settings` are those of a folder in Hugging Face format: the strings of special tokens, and whether texts begin with
    a BOS. Without any, the strings are those of the vocabulary's roles.
    """

    def __init__(self, vocabulary: "Vocabulary", settings: Mapping[str, Any] | None = None) -> None:
        self.chat_template = vocabulary.chat_template
        self.backend_tokenizer = vocabulary.tokenizer
        self._size: int = vocabulary.tokenizer.get_vocab_size()  # which goes through all of them each time
        self.bos_token_id, self.unk_token_id = vocabulary.bos_id, vocabulary.unk_id
        if settings is None:
            roles = {
                "bos": vocabulary.bos_id,
                "eos": (*vocabulary.stop_ids, None)[0],
                "pad": vocabulary.pad_id,
            }
            settings = {f"{role}_token": vocabulary.label(i) for role, i in roles.items() if i is not None}
        self.add_bos_token = settings.get("add_bos_token")
        named = {name: _content(settings.get(name)) for name in _NAMED}
        self.special_tokens_map = {name: token for name, token in named.items() if token is not None}

    @classmethod
    def of(cls, vocabulary: "Vocabulary") -> "PromptTokenizer":
        """The tokenizer of a vocabulary, with what the folder that it was read from says of special tokens.

        Raises: DataError for a file that cannot be read.
        """
        files = [Path(vocabulary.name) / f for f in ("special_tokens_map.json", "tokenizer_config.json")]
        if not any(file.exists() for file in files):
            return cls(vocabulary)
        return cls(vocabulary, _object(files[0]) | _object(files[1]))

    def __len__(self) -> int:
        return self._size

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        added: dict[int, AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that have a role."""
        return [t for t in self.special_tokens_map.values() if self.convert_tokens_to_ids(t) is not None]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        index: int | None = self.backend_tokenizer.token_to_id(token)
        return index

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """The ids of a text; `split_special_tokens`: special tokens in it are text."""
        backend = self.backend_tokenizer
        before, backend.encode_special_tokens = backend.encode_special_tokens, split_special_tokens
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        finally:
            backend.encode_special_tokens = before
        return ids


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    content = read_json(file, DataError)
    return content if isinstance(content, dict) else {}
