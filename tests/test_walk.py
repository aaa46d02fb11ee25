"""A new user's way from `gold init` to a trained student of a real pair: a narrow terminal, a folder with spaces."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.assets import assets_folder
from gold.starter import CONFIG, HELDOUT

COLUMNS = 60
QUESTIONS = (
    *("What is a glacier?", "Name three kinds of bread.", "Why is the sky blue?", "Who wrote Hamlet?"),
    *("How do I boil an egg?", "What is a verb?", "Say hello in French.", "What is 12 times 12?"),
)


def questions(place: Path) -> Path:
    """A file of conversations: parquet where pyarrow is installed, else JSON lines."""
    rows = [{"messages": [{"role": "user", "content": each}]} for each in QUESTIONS]
    try:
        from pyarrow import Table, parquet
    except ImportError:
        file = place / "my questions.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    else:
        file = place / "my questions.parquet"
        parquet.write_table(Table.from_pylist(rows), file)
    return file


def gold(place: Path, *arguments: object, stdin: str | None = None) -> str:
    """What the installed command prints on a terminal of 60 columns; its input is a pipe if ``stdin`` is given."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-m", "gold", *map(str, arguments)],
        cwd=place,
        env={**environment, "TERM": "xterm", "NO_COLOR": "1"},
        stdin=subprocess.PIPE if stdin is not None else theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    if child.stdin is not None and stdin is not None:
        child.stdin.write(stdin.encode())
        child.stdin.close()
    printed = bytearray()
    try:
        while data := os.read(ours, 65536):
            printed += data
    except OSError:  # the terminal is closed
        pass
    finally:
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed.decode("utf-8", "replace")).replace("\r\n", "\n")
    assert child.wait() == 0, text
    return text


@pytest.mark.slow
@pytest.mark.assets("smollm2-135m-instruct", "gemma3-270m")
def test_a_new_user_trains_a_pair(tmp_path: Path) -> None:
    assets = assets_folder()
    home = tmp_path / "my first run"
    home.mkdir()
    pair = ["--student", assets / "smollm2-135m-instruct", "--teacher", assets / "gemma3-270m"]
    made = gold(home, "init", "chat", "a chat", *pair)
    assert "cd 'a chat'" in made
    here = home / "a chat"
    prompts = questions(here)
    few = [f"data.prompts={prompts.name}", "rollout.max_new_tokens=16", "rollout.num_generations=1"]
    few += ["train.prompts_per_step=2", "train.steps=8", "evaluate.prompts=2", f"data.heldout={HELDOUT}"]

    assert "student" in gold(here, "doctor", CONFIG, *few)
    gold(here, "train", CONFIG, *few)
    first = here / "runs" / "first"
    steps = [json.loads(line) for line in (first / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [each["step"] for each in steps if each["kind"] == "train"] == list(range(1, 9))
    with safe_open(first / "student" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert "smollm2" in (first / "student" / "README.md").read_text("utf-8")

    assert "report.html" in gold(here, "report", "runs/first")
    gold(here, "train", CONFIG, *few, "train.steps=1", "train.seed=1", "output=runs/second")
    compared = gold(here, "compare", "runs/first", "runs/second")
    assert "reverse KL" in compared
    assert max(map(len, compared.splitlines())) <= COLUMNS

    answers = gold(here, "chat", "runs/first", "--max-new-tokens", 8, stdin="What is a glacier?\n/quit\n")
    for name in ("student", "teacher", "start"):
        assert f"[{name}, " in answers
    measured = gold(here, "eval", "runs/first")
    assert re.search(r"reverse_kl_per_byte +[0-9.]+ nats/byte", measured)
