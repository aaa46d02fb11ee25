"""Tokenizers of folders without tokenizer.json: `tokenizer.model`, `vocab.json` with `merges.txt`, `vocab.txt`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gold.errors import VocabularyError
from gold.files import read_bytes, read_json_object, read_text
from gold.tokenize.convert.construct import add_tokens, word_piece_tokenizer
from gold.tokenize.convert.gguf_pretokenizers import named_byte_level
from gold.tokenize.convert.sentencepiece import read_model, tokenizer_of
from gold.tokenize.families import MOST_IDS
from gold.tokenize.roles import token_content

FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")

# Classes of transformers that use the ids and the pre-tokenization of the file, for folders that name one.
_PIECES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_WORDS_OF = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_WORD_PIECES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
_BERT = {
    name: f"[{name[:-6].upper()}]"
    for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
}


def older_tokenizer(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, int]] | None:
    """The tokenizer of a folder's older files and the ids by role that they define; None if it has no such files.

    `config` are the folder's settings. A folder without settings is interpreted like the first model of its format: a
    space in front as in Llama-2, words as in GPT-2, lower case as in BERT.

    Raises: VocabularyError if a file is broken, or the settings name a tokenizer that does more than its file says.
    """
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if (file := folder / "tokenizer.model").exists():
        if (named and named not in _PIECES) or config.get("legacy") is False:
            raise _refused(file, named)
        pieces, roles = read_model(read_bytes(file, VocabularyError), str(file))
        return _with_named(tokenizer_of(pieces), folder, config), roles
    if (file := folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        if named and named not in _WORDS_OF:
            raise _refused(file, named)
        vocab, merges = _vocab_of(file), _merges_of(folder / "merges.txt")
        if any(token.endswith("</w>") for token in vocab):
            raise _refused(file, "one with marks at the ends of words")
        try:
            tokenizer = named_byte_level(vocab, merges, _WORDS_OF.get(named, "gpt-2"))
        except VocabularyError as error:
            raise VocabularyError(f"{file}: {error}") from None
        end = (
            {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos")} if "<|endoftext|>" in vocab else {}
        )
        return _with_named(tokenizer, folder, {**end, **config}), {
            role: vocab["<|endoftext|>"] for role in ("bos", "eos") if end and f"{role}_token" not in config
        }
    if (file := folder / "vocab.txt").exists():
        if named and named not in _WORD_PIECES:
            raise _refused(file, named)
        return _with_named(_word_pieces(file, config), folder, {**_BERT, **config}), {}
    return None


def _refused(file: Path, named: str) -> VocabularyError:
    return VocabularyError(
        f"{file} belongs to a tokenizer that the file alone does not describe ({named or 'legacy: false'}); save it as "
        "tokenizer.json: AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
    )


def _word_pieces(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    lines = read_text(file, VocabularyError).removesuffix("\n").split("\n")
    vocab = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    unknown = token_content(config.get("unk_token", "[UNK]"))
    if unknown not in vocab:
        raise VocabularyError(
            f"{file} has no unknown token {unknown!r}; is it a list of word pieces, one a line?"
        )
    return word_piece_tokenizer(
        vocab,
        str(unknown),
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )


def _with_named(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer plus the tokens named in the settings: by id, by file, and special ones by role."""
    listed = config.get("added_tokens_decoder")
    by_id = dict(listed) if isinstance(listed, dict) else {}
    file = folder / "added_tokens.json"
    if file.exists():
        for content, index in _vocab_of(file).items():
            by_id.setdefault(str(index), {"content": content})
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for index, token in by_id.items():
        if not (index.isdecimal() and len(index) < 10 and isinstance(token, dict) and token_content(token)):
            raise VocabularyError(
                f"{folder}: its added tokens have one that is none, {index[:20]!r}: {str(token)[:60]}"
            )
    for index, token in sorted(by_id.items(), key=lambda item: int(item[0])):
        content = token["content"]
        given = {flag: bool(token[flag]) for flag in flags if flag in token}
        added = AddedToken(content, **{"normalized": False, **given})
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([added])
        if (own := tokenizer.token_to_id(content)) != int(index):
            raise VocabularyError(
                f"{folder}: token {content!r} has id {index} in its settings, {own} in its files"
            )
    roles = [token_content(value) for name, value in config.items() if name.endswith("_token")]
    more = config.get("additional_special_tokens")
    roles += [token_content(value) for value in more] if isinstance(more, list) else []
    known = [token for token in dict.fromkeys(roles) if token and tokenizer.token_to_id(token) is not None]
    add_tokens(tokenizer, known)
    return tokenizer


def _vocab_of(file: Path) -> dict[str, int]:
    vocab = read_json_object(file, VocabularyError)
    if not all(type(index) is int and 0 <= index < MOST_IDS for index in vocab.values()):
        raise VocabularyError(f"{file} is no vocabulary: expected an object of tokens and their ids")
    return vocab


def _merges_of(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(file, VocabularyError).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise VocabularyError(f"{file}:{number}: expected two tokens, got {line[:60]!r}")
        merges.append((pair[0], pair[1]))
    return merges
