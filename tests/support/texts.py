"""Texts and ids for property tests, rich in what tokenizers stumble over."""

import numpy as np
from hypothesis import strategies as st

from gold.tokenize.vocabulary import Vocabulary

_TRICKY = (
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "▁",
        "▁▁",
        "Ġ",
        "Ċ",
        "é",
        "e\u0301",
        "q\u0307\u0323",
        "a\u0323\u0301",
        "か\u3099",
        "が",
    ),
    *(
        "\u1100\u1161\u11a8",
        "ﬁ",
        "½",
        "Ω",
        "Å",
        "ß",
        "İ",
        "\u0300",
        "\u0344",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\xa0",
        "\xad",
    ),
    *(
        "🙂",
        "👩\u200d👩\u200d👧",
        "🏽",
        "🇩🇪",
        "\x00",
        "\x01",
        "\x1b",
        "\x7f",
        "\u2028",
        "\ufffd",
        "\U000e0041",
        "\U00050000",
    ),
    *(
        "<bos>",
        "<eos>",
        "<unk>",
        "<s>",
        "<|turn|>",
        "<think>",
        "<pause>",
        " <pause> ",
        "<0x0A>",
        "<|im_start|>",
        "##a",
    ),
    *(
        "don't",
        "it's",
        "THE",
        "the",
        "12345",
        "1,000.5",
        "foobar",
        "foo bar",
        "日本語",
        "한국어",
        "Привет",
        "عربي",
        "हिन्दी",
    ),
)

text = st.lists(st.one_of(st.sampled_from(_TRICKY), st.text(max_size=6)), max_size=8).map("".join)
"""Strings, lone surrogates left out."""

data = st.lists(st.one_of(st.sampled_from(_TRICKY).map(str.encode), st.binary(max_size=4)), max_size=8).map(
    b"".join
)
"""Bytes, often not valid UTF-8."""


def ids_of(vocabulary: Vocabulary) -> st.SearchStrategy[list[int]]:
    """Any ids, as a model could sample them."""
    long = np.argsort(np.diff(vocabulary.offsets), kind="stable")[-200:].tolist()
    return st.lists(st.one_of(st.integers(0, vocabulary.size - 1), st.sampled_from(long)), max_size=30)
