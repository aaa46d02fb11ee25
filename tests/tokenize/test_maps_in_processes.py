"""The maps between two vocabularies in processes that list the same vocabulary in other orders, and work at once."""

import os
import subprocess
import sys
from pathlib import Path

from support.tokenizers import families

# Prints the order in which a process lists its vocabularies, and then what all maps between them are.
PROGRAM = """
import sys
from hashlib import sha256
from tokenizers import Tokenizer
from gold.align.overlap import byte_equal_pairs
from gold.bytes.prefixes import longest_prefixes
from gold.tokenize.vocabulary import Vocabulary
from gold.bytes.trie import ByteTrie

listed = [list(Tokenizer.from_file(name).get_vocab()) for name in sys.argv[1:]]
print(sha256(repr(listed).encode()).hexdigest())
sides = [Vocabulary.load(name) for name in sys.argv[1:]]
maps = [side.fingerprint.encode() for side in sides]
for a in sides:
    maps += [a.canonical_ids(), ByteTrie.of(a).order]
    for b in sides:
        maps += [*byte_equal_pairs(a, b), *vars(longest_prefixes(a, b)).values()]
print(sha256(b"".join(map(bytes, maps))).hexdigest())
"""
ROOT = Path(__file__).parents[2]


def test_every_process_finds_the_same_maps(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = []
    for name in ("byte-level, added tokens", "byte-level, bytes missing", "byte-fallback, added tokens"):
        files.append(str(tmp_path / f"{name}.json"))
        families()[name].save(files[-1])
    command = [sys.executable, "-c", PROGRAM, *files]
    # Two begin with an empty cache at the same time, one has none.
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "GOLD_CACHE": kept},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, kept in (("0", str(cache)), ("1", str(cache)), ("2", ""))
    ]
    answers = [process.communicate(timeout=900)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    listings, maps = zip(*answers, strict=True)
    assert len(set(listings)) > 1
    assert len(set(maps)) == 1
    written = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert len(written) == len(files) ** 2
    # What they left is what a later one reads.
    later = subprocess.run(
        command,
        env={**os.environ, "GOLD_CACHE": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert later.stdout.split()[1] == maps[0]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == written
