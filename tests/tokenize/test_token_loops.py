"""The passes over the tokens of a text, as they are written and compiled, against one line of Python."""

import subprocess
import sys
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import ids_of
from support.tokenizers import byte_level_bpe

from gold.tokenize import text as text_module
from gold.tokenize.token_loops import _compiled
from gold.tokenize.vocabulary import Vocabulary

VOCABULARY = Vocabulary.load(byte_level_bpe())
ids_and_padding = ids_of(VOCABULARY).flatmap(
    lambda ids: st.lists(st.sampled_from([*ids, VOCABULARY.size, VOCABULARY.size + 63]), max_size=30)
)


@pytest.fixture(params=["python", "compiled"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = request.param == "python"
    monkeypatch.setattr(
        text_module, "walk", lambda function, _: function if as_it_is else _compiled(function)
    )


@given(ids_and_padding)
def test_ends_and_bytes_are_those_of_the_ids_one_after_the_other(ids: list[int]) -> None:
    pieces = [VOCABULARY.token_bytes(i) if i < VOCABULARY.size else b"" for i in ids]
    joined, ends = VOCABULARY._table.join(np.array(ids, np.int32))
    assert joined == b"".join(pieces)
    assert (
        ends.tolist()
        == VOCABULARY.ends(np.array(ids, np.int32)).tolist()
        == list(accumulate(map(len, pieces)))
    )


def test_short_texts_load_no_compiler_and_long_ones_do() -> None:
    code = (
        "import sys, numpy as np\n"
        "from support.tokenizers import byte_level_bpe\n"
        "from gold import Vocabulary, align_tokens\n"
        "vocabulary = Vocabulary.load(byte_level_bpe())\n"
        "for tokens in (1 << 14, 1 << 16):\n"
        "    tokenized = vocabulary.decode(np.full(tokens, 9))\n"
        "    print('numba' in sys.modules, len(align_tokens(tokenized, tokenized)))\n"
    )
    path = [str(p) for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path)},
    )
    assert done.stdout.split() == ["False", str(1 << 14), "True", str(1 << 16)]
