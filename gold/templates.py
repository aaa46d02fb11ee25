"""A tokenizer with its chat template, rendered as transformers renders it but without importing that."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from gold.errors import DataError

if TYPE_CHECKING:
    from gold.align.vocabulary import Vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PromptTokenizer:
    """As much of the interface of a Hugging Face tokenizer as `gold.chat` needs of one.

    `settings` are those of a folder in Hugging Face format: the strings of special tokens, and whether texts begin with
    a BOS. Without any, the strings are those of the vocabulary's roles.
    """

    def __init__(self, vocabulary: "Vocabulary", settings: Mapping[str, Any] | None = None) -> None:
        self.chat_template = vocabulary.chat_template
        self.backend_tokenizer = vocabulary.tokenizer
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
        self._special_tokens = {name: token for name, token in named.items() if token is not None}

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
        return self.backend_tokenizer.get_vocab_size()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        added: dict[int, AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that have a role."""
        return [t for t in self._special_tokens.values() if self.convert_tokens_to_ids(t) is not None]

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

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> Any:
        """The rendered messages, as a text or as ids."""
        text = compiled_template(self.chat_template or "").render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


def compiled_template(template: str) -> Any:
    """A Jinja template as transformers sets it up, in a sandbox: whoever made the folder wrote the program.

    Raises: jinja2.TemplateError for one that cannot be read; so does its `render` for messages that it refuses.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote; what stands in it is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class PlainNamespace(Namespace):
        """A namespace without names that mean something to Python."""

        def __init__(self, **values: Any) -> None:
            super().__init__()
            for name, value in values.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace has no names that begin with _, such as {name}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PlainNamespace,
        "dict": lambda *values, **named: dict(*values, **named),
    }
    return environment.from_string(template)


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}
