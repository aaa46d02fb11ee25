"""Two byte-level BPE tokenizers of about fifteen tokens that split the same words in different places.

python examples/tiny_tokenizers.py FOLDER      # writes student.json and teacher.json
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

STUDENT = "h+e he+l l+o _+w o+r _w+or _wor+l _worl+d"
TEACHER = "h+e l+l ll+o _+w _w+o r+l rl+d"


def tokenizer_of(merges: str) -> Tokenizer:
    """BPE with the given merges over their letters and the comma; `_` is a space."""
    pairs = [tuple(m.split("+")) for m in merges.replace("_", "Ġ").split()]
    letters = sorted({",", *(letter for pair in pairs for letter in "".join(pair))})
    tokens = ["<eos>", *letters, *(left + right for left, right in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_of(STUDENT).save(str(folder / "student.json"))
    tokenizer_of(TEACHER).save(str(folder / "teacher.json"))
