"""A tokenizer with its chat template, rendered as transformers renders it but without importing that."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from gold.errors import DataError
from gold.files import read_json
from gold.sandbox import compiled_template

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


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    content = read_json(file, DataError)
    return content if isinstance(content, dict) else {}
