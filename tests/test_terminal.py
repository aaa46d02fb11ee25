"""Nothing that others wrote steers the terminal, by whichever way it gets there."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from support.command import Ended, run_gold
from support.tokenizers import byte_level_bpe
from tokenizers import AddedToken

import gold
from gold import terminal
from gold.activity import Activity
from gold.cache.command import run_info, run_merge, run_verify
from gold.cache.shard import Origin
from gold.cache.store import ScoreCache
from gold.doctor.finding import Finding, Report
from gold.doctor.report import print_report
from gold.errors import ConfigError, DataError
from gold.train.progress import Lines, Live, Quiet
from gold.train.trackers import RunInfo

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\r\u202egpj\u2066\u2028fake\ud800\b"
STEERING = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(shown: str) -> str:
    assert not STEERING.search(shown), repr(shown)
    return shown


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text(st.characters(), max_size=30) | st.just(EVIL))
def test_a_line_is_one_line_and_steers_nothing(text: str) -> None:
    shown = harmless(terminal.line(text))
    assert len(shown.splitlines()) <= 1
    assert terminal.line(shown) == shown
    if text.isprintable():
        assert shown == text
    several = harmless(terminal.lines(f"{text}\n{text}"))
    assert several.count("\n") == 2 * text.count("\n") + 1


@given(st.lists(st.text() | st.dictionaries(st.text(), st.text(), max_size=2), max_size=3))
def test_json_is_the_same_value_and_steers_nothing(value: Any) -> None:
    out = io.StringIO()
    terminal.show_json(value, out)
    assert json.loads(harmless(out.getvalue())) == value
    assert out.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    "shown", [EVIL, Text(EVIL, "bold"), Text.assemble((EVIL, "red"), "x")], ids=["text", "styled", "several"]
)
def test_a_console_lets_nothing_through_but_its_own_styles(shown: Any) -> None:
    table = Table.grid()
    table.add_row(shown, "after")
    for what in (shown, table):
        out = Tty()
        console = terminal.new_console(out)
        console.print(what)
        without_styles = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
        assert not re.search("[\x07\x9b\x7f\r\u202e\ud800\b]|\x1b", without_styles), repr(out.getvalue())
        plain = io.StringIO()
        terminal.new_console(plain).print(what)
        harmless(plain.getvalue())


REPORT = Report(
    checks=[Finding(EVIL, "warn", f"found {EVIL}", f"advice {EVIL}"), Finding("x", "fail", EVIL)],
    coverage={},
    unchecked=[f"not {EVIL}"],
)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("stream", [io.StringIO, Tty])
def test_a_report_steers_nothing(as_json: bool, stream: type[io.StringIO]) -> None:
    out = stream()
    print_report(REPORT, as_json=as_json, stream=out)
    harmless(re.sub("\x1b\\[[0-9;]*m", "", out.getvalue()))


STEP = {"step": 1, "loss": 0.5, "length_bytes": 3.0, "tokens_per_s": 1.0, "step_s": 0.1}


@pytest.mark.parametrize("kind", [Quiet, Lines, Live])
def test_the_progress_of_a_run_steers_nothing(
    kind: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = kind()
    header = {"student": f"{EVIL} [link=http://x]s[/link]", "teacher": "[red]t[/red]\nerror: fake"}
    shown.doing(Activity((f"loading {EVIL} [red]m[/red]",)))
    shown.start(RunInfo({}, header, steps=1))
    shown.doing(Activity(("evaluation", EVIL), 1, 2, EVIL))
    shown.log("train", STEP)
    shown.note(f"note {EVIL}\nerror: fake [bold]x[/bold]")
    shown.log("eval", {"step": 1, "accuracy": 0.5})
    shown.finish()
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not any(each.startswith("error: ") for each in harmless(text).splitlines())
    if kind is not Quiet:
        assert "[red]t[/red]" in printed.out  # no markup


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Runs `gold` with arguments, and gives its exit code, stdout and stderr."""
    showing, making = warnings.formatwarning, logging.getLogRecordFactory()
    handlers = list(logging.getLogger("gold").handlers)

    def run(*arguments: object) -> Ended:
        ended = run_gold(monkeypatch, capfd, *arguments)
        return ended._replace(out=harmless(ended.out), err=harmless(ended.err))

    yield run
    warnings.formatwarning = showing
    logging.setLogRecordFactory(making)
    logging.getLogger("gold").handlers[:] = handlers


def put(monkeypatch: pytest.MonkeyPatch, module: str, name: str, does: Callable[..., Any]) -> None:
    replaced = ModuleType(module)
    setattr(replaced, name, does)
    monkeypatch.setitem(sys.modules, module, replaced)


def raises(error: BaseException) -> Callable[..., Any]:
    def called(*_: object, **__: object) -> Any:
        raise error

    return called


def test_a_line_break_in_an_error_is_no_second_error(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        monkeypatch, "gold.inspect.plots", "plot_run", raises(DataError(f"a name {EVIL}\nerror: all is well"))
    )
    done = call("plot", "x")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    put(monkeypatch, "gold.inspect.plots", "plot_run", raises(ConfigError("one\ntwo", "three")))
    assert call("plot", "x").err == "error: one\\ntwo\nerror: three\n"


def test_keys_names_and_values_of_a_configuration(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    known = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "output": "o"}
    for change in (
        {EVIL.replace("\ud800", ""): 1},
        {"student": {"path": "s", "a\nerror: b": EVIL[:8]}},
        {"objectives": [{"name": "x\nerror: fake\x1b[2J"}]},
        {"objectives": [{"name": "jsd", "beta\n\x1b[2J": 1}]},
        {"teachers": {"a\n\x9b": {"path": "t"}}},
        {"train": {"precision": "\x1b]0;x\x07"}},
    ):
        path.write_text(yaml.safe_dump(known | change, allow_unicode=False), "utf-8")
        done = call("train", path)
        assert done.code == 1
        lines = done.err.splitlines()
        assert all(one.startswith(f"error: {path}:") for one in lines), lines
        assert len(lines) == 1, lines


@pytest.mark.parametrize(
    "arguments",
    [
        (f"no{EVIL[:-2]}",),
        ("train", "--x\x1b[2J"),
        ("train", "no\x1b[2J\nfile"),
        ("train", "x.yaml", "a\x1b[2J=1"),
        ("align", "--student", "no\x1b[2J", "--teacher", "no", "x"),
        ("doctor", "no\x1b[2J", "\x9b2J"),
        ("plot", "no\x1b[2J\n"),
        ("cache", "info", "no\x1b[2J"),
        ("cache", "verify", "no\x1b[2J"),
        ("objectives", "no\x1b[2J\n"),
        ("eval", "no\x1b[2J\n"),
    ],
)
def test_arguments_and_file_names(call: Any, arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.code in (1, 2)
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("error: ")


def test_special_tokens_names_and_text_of_an_alignment(call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "evil\x1b[2J"
    folder.mkdir()
    sources = []
    for side, evil in (("student", EVIL.replace("\ud800", "")), ("teacher", "<\x1b[2J\x9b>")):
        tokenizer = byte_level_bpe()
        tokenizer.add_special_tokens([AddedToken(evil, special=True)])
        tokenizer.save(str(folder / f"{side}.json"))
        sources += [f"--{side}", folder / f"{side}.json"]
    last = byte_level_bpe().get_vocab_size()
    for more in (
        ("a\x1b[2J\x9b",),
        ("--ids", f"1 {last}"),
        ("--ids", f"1 {last}", "--json"),
        ("x", "--json"),
    ):
        assert call("align", *sources, *more).code == 0
    done = call("align", *sources, "--ids", f"{last + 7}")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert call("doctor", folder / "student.json", folder / "teacher.json").out
    assert call("doctor", "--json", folder / "student.json", folder / "teacher.json").out


def test_what_a_cache_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c\x1b[2J"
    with ScoreCache.open(folder, Origin(f"name {EVIL[:-2]}", "r\x9b", "v\x1b", 3)) as cache:
        cache.add([(bytes(32), 1, b"x")])
    run_info(folder)
    run_info(folder, as_json=True)
    run_verify(folder)
    run_merge(tmp_path / "into\x1b[2J", [folder])
    harmless(capsys.readouterr().out)


def test_measures_pictures_and_warnings(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(measures={f"m{EVIL}": 0.5}, samples=[{"prompt": EVIL}])
    put(monkeypatch, "gold.run", "evaluate_source", lambda *_: found)
    assert call("eval", "x").code == 0
    assert json.loads(call("eval", "x", "--json").out)["samples"] == [{"prompt": EVIL}]

    def plot(_: Path) -> list[Path]:
        said = warnings.formatwarning(f"warned of {EVIL}\nerror: fake", UserWarning, "file", 1)
        sys.stderr.write(said)
        logging.getLogger("other").warning("logged %s", EVIL)
        logging.getLogger("gold.x").info("not shown")
        logging.getLogger("gold.x").warning("mine %s", EVIL)
        return [Path(f"p{EVIL[:-2]}.png")]

    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("other").addHandler(handler)
    put(monkeypatch, "gold.inspect.plots", "plot_run", plot)
    done = call("plot", "x")
    logging.getLogger("other").removeHandler(handler)
    assert done.code == 0
    assert "warning: warned of \\x1b[2J" in done.err
    assert "warning: mine \\x1b[2J" in done.err
    assert "not shown" not in done.err


# How it ends


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nTried"),
            "CUDA out of memory. Tried",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), "f: No space left on device"),
        (type("PanicException", (BaseException,), {})("index out\nof bounds"), "index out of bounds"),
        (SystemExit("a library ends\x1b"), "a library ends\\x1b"),
    ],
)
def test_errors_that_are_no_bugs_are_one_line(
    call: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    put(monkeypatch, "gold.inspect.plots", "plot_run", raises(error))
    done = call("plot", "x")
    assert done.code == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_the_traceback_of_a_bug_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError(f"a bug {EVIL}")
    except ZeroDivisionError as error:
        terminal.show_traceback(type(error), error, error.__traceback__)
    assert "Traceback" in harmless(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{gold} --version > /dev/full", 1, "No space left on device"),
        ("{gold} --version <&- >&- 2>&-", 0, ""),
        ("exec 3> >(:); sleep 0.2; {gold} --version >&3", 1, ""),
    ],
)
def test_a_stdout_that_cannot_be_written(shell: str, code: int, said: str) -> None:
    command = shell.format(gold=f"{sys.executable} -m gold")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


def test_nothing_prints_but_by_the_module_of_the_terminal() -> None:
    root = Path(gold.__file__).parent
    printing = re.compile(r"(?<![\w.])(print|Console)\(|std(out|err)\.write")
    others = [path for path in root.rglob("*.py") if path.name != "terminal.py"]
    assert not [path for path in others if printing.search(path.read_text("utf-8"))]
