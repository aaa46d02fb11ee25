"""Tokenizers from SentencePiece pieces and scores: the file `tokenizer.model`, and its contents in GGUF files."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from gold.errors import VocabularyError
from gold.tokenize.convert.construct import SPACE, add_tokens, merges_of_ranked, space_decoder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces."""


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece model: its pieces by id, with scores and types, and its normalization.

    `charsmap` is its compiled character map, empty if it has none. With `squeezes`, spaces at both ends are dropped and
    runs of spaces become one; with `space_first` a space is then added before the text.
    """

    strings: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unigram: bool = False
    charsmap: bytes = b""
    squeezes: bool = False
    space_first: bool = True


def tokenizer_of(pieces: Pieces) -> Tokenizer:
    """The tokenizer that gives texts the same ids as a SentencePiece model.

    Control pieces are special tokens; user-defined ones are matched in the text before anything else, and the text
    after one is tokenized like the beginning of a text. As in published tokenizers of this kind, user-defined runs of
    spaces are merged like other pieces, the longest first.
    """
    named = {kind: [i for i, k in enumerate(pieces.kinds) if k == kind] for kind in range(1, 7)}
    unknown = named[UNKNOWN][0] if named[UNKNOWN] else None
    tokenizer = Tokenizer(_unigram(pieces, unknown) if pieces.unigram else _bpe(pieces, unknown))
    tokenizer.normalizer = _normalizer(pieces)
    if pieces.unigram:
        tokenizer.pre_tokenizer = _words(pieces)
    tokenizer.decoder = space_decoder(strips=pieces.space_first)
    special = [pieces.strings[i] for i in named[UNKNOWN] + named[CONTROL]]
    add_tokens(tokenizer, special, [_as_run(pieces.strings[i]) for i in named[USER_DEFINED]])
    return tokenizer


def read_model(data: bytes, where: str) -> tuple[Pieces, dict[str, int]]:
    """The pieces in the bytes of a `tokenizer.model`, and its ids by role: bos, eos, pad.

    Raises: VocabularyError if it is no such file, or a word or character model.
    """
    strings: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                strings.append(bytes(piece[1]).decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])  # type: ignore[arg-type]
                kinds.append(int(piece.get(3, NORMAL)))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        strings = []
    if not strings:
        raise VocabularyError(f"{where} is no SentencePiece model") from None
    kind = trainer.get(3, 1)
    if kind not in (1, 2) or trainer.get(24):
        raise VocabularyError(
            f"{where} is a SentencePiece model of a kind that is not read here (neither unigram nor BPE, or with "
            "spaces at the ends of words); save it as tokenizer.json with transformers"
        )
    charsmap = normalizer.get(2, b"")
    roles = {name: trainer.get(field, default) for name, field, default in _ROLE_FIELDS}
    return Pieces(
        strings,
        scores,
        kinds,
        unigram=kind == 1,
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        squeezes=bool(normalizer.get(4, True)),
        space_first=bool(normalizer.get(3, True)),
    ), {name: i for name, i in roles.items() if isinstance(i, int) and i < len(strings)}


# Field numbers and defaults of the ids in SentencePiece's TrainerSpec; an absent role is −1, a large number here.
_ROLE_FIELDS = (("bos", 41, 1), ("eos", 42, 2), ("pad", 43, 1 << 64))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and values of the fields of a protobuf message: integers, or bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield key >> 3, data[at : at + size]
        at += size


def _bpe(pieces: Pieces, unknown: int | None) -> models.BPE:
    defined = [kind == USER_DEFINED for kind in pieces.kinds]
    strings = [_as_run(s) if own else s for s, own in zip(pieces.strings, defined, strict=True)]
    runs = [s for s, own in zip(strings, defined, strict=True) if own and s and not s.strip(SPACE)]
    used = [i for i, kind in enumerate(pieces.kinds) if kind != UNUSED and strings[i]]
    normal = [i for i in used if pieces.kinds[i] == NORMAL]
    ranked = [strings[i] for i in sorted(normal, key=lambda i: -pieces.scores[i])]
    parts = {strings[i] for i in used if pieces.kinds[i] in (NORMAL, USER_DEFINED)}
    # All runs have the same score; longer ones come first, as in the published files.
    of_runs = merges_of_ranked(runs, {*runs, SPACE})
    of_runs.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    return models.BPE(
        vocab={strings[i]: i for i in used},
        merges=of_runs + merges_of_ranked(ranked, parts),
        unk_token=None if unknown is None else strings[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in pieces.kinds,
    )


def _unigram(pieces: Pieces, unknown: int | None) -> models.Unigram:
    normal = [s for s, kind in zip(pieces.scores, pieces.kinds, strict=True) if kind == NORMAL]
    lowest = min(normal, default=0.0)
    # The others are kept for their ids; a lower score would be taken for the unknown character's.
    scored = [
        (string, score if kind == NORMAL else lowest)
        for string, score, kind in zip(pieces.strings, pieces.scores, pieces.kinds, strict=True)
    ]
    return models.Unigram(scored, unknown, BYTE in pieces.kinds)


def _words(pieces: Pieces) -> pre_tokenizers.Sequence:
    """Prevents text from matching control or byte pieces: `<0x0A>` is six characters. A space begins a word."""
    silent = {
        s for s, kind in zip(pieces.strings, pieces.kinds, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)
    }
    firsts = [f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in sorted(silent) if len(s) > 1]
    steps: list[pre_tokenizers.PreTokenizer] = []
    if not any(SPACE in string[1:] for string in pieces.strings):
        steps.append(pre_tokenizers.Metaspace(prepend_scheme="never"))
    if firsts:
        steps.append(pre_tokenizers.Split(Regex("|".join(firsts)), "merged_with_previous"))
    return pre_tokenizers.Sequence(steps)


def _normalizer(pieces: Pieces) -> normalizers.Sequence:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.squeezes:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    if pieces.squeezes:
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    if pieces.space_first:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _as_run(string: str) -> str:
    """The string itself; spaces alone become as many `▁`."""
    return string if string.strip(" ") else SPACE * len(string)
