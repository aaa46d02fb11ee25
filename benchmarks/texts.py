"""Texts for the benchmarks: odd ones, drawn at random over all of Unicode, and long plain ones."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from gold.doctor.sample import SAMPLE

# First and last code points, each range as likely as another.
SCRIPTS = (
    *(
        (0x00, 0x1F),
        (0x20, 0x7E),
        (0x7F, 0xFF),
        (0x100, 0x24F),
        (0x370, 0x3FF),
        (0x400, 0x52F),
        (0x590, 0x5FF),
    ),
    *((0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F)),
    *(
        (0x2070, 0x218F),
        (0x2460, 0x27BF),
        (0x3000, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xE000, 0xE0FF),
    ),
    *(
        (0xF900, 0xFB4F),
        (0xFB50, 0xFDFF),
        (0xFE00, 0xFE0F),
        (0xFE30, 0xFFEF),
        (0xFFF0, 0xFFFF),
        (0x10330, 0x1034F),
    ),
    *((0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF), (0x20000, 0x2FA1D), (0xE0000, 0xE01EF), (0x10FFF0, 0x10FFFF)),
)
MARKS = (
    *((0x300, 0x36F), (0x483, 0x489), (0x591, 0x5BD), (0x64B, 0x65F), (0x93A, 0x94D), (0xE31, 0xE3A)),
    *(
        (0x1160, 0x11FF),
        (0x1AB0, 0x1ACE),
        (0x20D0, 0x20F0),
        (0x302A, 0x302F),
        (0x3099, 0x309A),
        (0xFE00, 0xFE0F),
    ),
    *((0xFE20, 0xFE2F), (0xFF9E, 0xFF9F), (0x1D165, 0x1D169), (0xE0100, 0xE0110)),
)
WHITE = " \t\n\r\v\f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u200c\u200d\u2060\ufeff"
EMOJI = (
    *(
        "🙂",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪",
        "🇫🇷🇩",
        "1️⃣",
        "❤️",
        "❤",
        "🧑🏿‍🚀",
        "🏴\U000e0067\U000e0062\U000e007f",
        "🏽",
        "\u200d",
        "\ufe0f",
    ),
    *("☺︎", "🫠", "©️", "🈁"),
)
WORDS = (
    *(
        "the",
        "The",
        "THE",
        " the",
        "don't",
        "it's",
        "foobar",
        "foo bar",
        "123",
        "4567",
        "1,000.5",
        "3.14e-10",
    ),
    *(
        "def f(x):\n    return x",
        "https://a.b/c?d=e&f",
        "Straße",
        "İstanbul",
        "naïve",
        "ﬁne",
        "½",
        "①",
        "Ω",
        "Å",
    ),
    *(
        "日本語",
        "한국어",
        "가",
        "か\u3099",
        "が",
        "Привет",
        "مرحبا",
        "हिन्दी",
        "ภาษาไทย",
        "עברית",
        "ŉ",
        "ǰ",
        "\u0344",
    ),
    *(
        "e\u0301",
        "é",
        "q\u0307\u0323",
        "\u0958",
        "\u1e9b\u0323",
        "ｶﾞ",
        "㌔",
        "ﷺ",
        "ᾳ",
        "ß",
        "ſ",
        "\u0130",
        "\ufffd",
    ),
)
FORGED = (
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<bos>",
        "<eos>",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "[MASK]",
        "<mask>",
        "<|im_end|>",
    ),
    *(
        "<|im_start|>",
        "<|eot_id|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<|return|>",
        "<｜User｜>",
        "<think>",
        "<pause>",
    ),
    *(
        "<0x0A>",
        "<0xFF>",
        "<0x0a>",
        "▁",
        "▁▁",
        "Ġ",
        "Ċ",
        "Ġthe",
        "##a",
        "##",
        "</w>",
        "\\x00",
        "&lt;s&gt;",
        "%20",
    ),
)


def odd_text(rng: random.Random, forged: Sequence[str] = FORGED) -> str | bytes:
    """A text that tokenizers stumble over: mostly 1 to 60 characters, one in two hundred up to some thousands.

    One in six is bytes and mostly no valid UTF-8; one in fifty has a lone surrogate. Some hold one of `forged`, strings
    that look like special tokens.
    """
    segments = rng.randint(1, 4) if rng.random() < 0.995 else rng.randint(20, 200)
    text = "".join(rng.choice(_SEGMENTS)(rng, forged) for _ in range(segments))
    kind = rng.random()
    if kind < 1 / 6:
        return _broken(rng, text.encode())
    if kind < 1 / 6 + 1 / 50:
        at = rng.randint(0, len(text))
        return text[:at] + chr(rng.randint(0xD800, 0xDFFF)) + text[at:]
    return text


def _any_characters(rng: random.Random, _: Sequence[str]) -> str:
    return "".join(map(_character, rng.choices(range(0x110000 - 0x800), k=rng.randint(1, 8))))


def _one_script(rng: random.Random, _: Sequence[str]) -> str:
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 15)))


def _scripts(rng: random.Random, _: Sequence[str]) -> str:
    return "".join(chr(rng.randint(*rng.choice(SCRIPTS))) for _ in range(rng.randint(1, 10)))


def _marked(rng: random.Random, _: Sequence[str]) -> str:
    bases = "aeioqAEßか가ᄀकا 1<"
    marks = (chr(rng.randint(*rng.choice(MARKS))) for _ in range(rng.randint(1, 6)))
    return rng.choice(bases) + "".join(marks) + rng.choice(bases)


def _white(rng: random.Random, _: Sequence[str]) -> str:
    if rng.random() < 0.5:
        return rng.choice(" \n\t") * rng.randint(1, 20)
    return "".join(rng.choices(WHITE, k=rng.randint(1, 8)))


def _ascii(rng: random.Random, _: Sequence[str]) -> str:
    return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 20)))


def _run(rng: random.Random, _: Sequence[str]) -> str:
    return rng.choice(rng.choice((WORDS, EMOJI, "aA1.-=_ \n你é\u0301\x00"))) * rng.randint(2, 12)


def _emoji(rng: random.Random, _: Sequence[str]) -> str:
    return "".join(rng.choices(EMOJI, k=rng.randint(1, 4)))


def _words(rng: random.Random, _: Sequence[str]) -> str:
    return rng.choice((" ", "", "  ", "-")).join(rng.choices(WORDS, k=rng.randint(1, 6)))


def _forged(rng: random.Random, forged: Sequence[str]) -> str:
    text = rng.choice(forged if rng.random() < 0.5 else FORGED)
    change = rng.randrange(6)
    if change == 0:
        return text[: rng.randint(0, len(text))]
    if change == 1:
        return text.swapcase()
    if change == 2:
        return f" {text} "
    return text


_SEGMENTS: tuple[Callable[[random.Random, Sequence[str]], str], ...] = (
    *(_any_characters, _one_script, _scripts, _marked, _white, _ascii, _run, _emoji, _words, _words, _forged),
)


def _character(index: int) -> str:
    return chr(index if index < 0xD800 else index + 0x800)


def _broken(rng: random.Random, data: bytes) -> bytes:
    """The bytes after a few cuts, insertions and changes."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(broken))
        change = rng.randrange(4)
        if change == 0:
            del broken[at : at + rng.randint(1, 3)]
        elif change == 1:
            broken[at:at] = rng.randbytes(rng.randint(1, 4))
        elif change == 2 and at < len(broken):
            broken[at] = rng.randrange(256)
        else:
            # A continuation alone, an overlong slash, a surrogate, beyond Unicode, a cut character, bytes never used.
            broken[at:at] = rng.choice(
                (b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xff\xfe")
            )
    return bytes(broken)


def plain_texts(count: int, size_bytes: int, seed: int = 0) -> list[str]:
    """Texts as models read and write them, of about so many bytes each.

    Two in five passages are English (Python's own manual), two in five code (its library), one in five the sample of
    `gold doctor`: other languages, digits, emoji, white space.
    """
    rng = random.Random(f"plain {seed}")
    library = sorted(Path(random.__file__).parent.glob("*.py"))
    sources = "\n".join(path.read_text("utf-8") for path in library[:: max(1, len(library) // 60)])
    kinds = (
        [passage for topic in topics.values() for passage in topic.split("\n\n")],
        sources.split("\n\n"),
        [passage for passages in SAMPLE.values() for passage in passages],
    )
    texts = []
    for _ in range(count):
        text, length = "", 0
        while length < size_bytes:
            passage = rng.choice(rng.choices(kinds, (2, 2, 1))[0])[: size_bytes - length]
            text += passage + "\n\n"
            length += len(passage.encode()) + 2
        texts.append(unicodedata.normalize("NFC", text))
    return texts
