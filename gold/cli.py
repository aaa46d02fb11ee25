"""The command line. Commands import what they need when they run, so that asking for help stays quick."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import gold
from gold import terminal
from gold.errors import GoldError

app = typer.Typer(
    name="gold",
    help="On-policy distillation between language models that do not share a tokenizer.",
    no_args_is_help=True,
    add_completion=False,
    # An error that gold raises is one line; any other keeps Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

cache = typer.Typer(
    help="Keep what a teacher says of texts in a folder, for students of any tokenizer to learn from.",
    no_args_is_help=True,
)
app.add_typer(cache, name="cache")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="changes, such as train.steps=30", show_default=False),
]


_SOURCE = "folder, tokenizer.json, GGUF file, SentencePiece model, tekken.json, tiktoken:NAME or Hub id"

_FORMATS = """\
The picture
  ┃ between chunks: here the tokens of both sides end together     ¦ between the tokens of a chunk
  · ⏎ ⇥ white space   \\x1b a byte or character that shows nothing by itself   ◌ before a mark that combines
  ⟨…⟩ an event   ∅ a token without bytes of the text   ~ a token whose own bytes are not the text's   ⋯ goes on below

The JSON, one object per text
  {"bytes": n, "student": {"ids": […], "ends": […], "repaired_bytes": n}, "teacher": {…},
   "chunks": [[s0, s1, t0, t1], …], "repaired_bytes": n, "coverage": {…}}
  Student tokens s0 up to s1 (exclusive) and teacher tokens t0 up to t1 spell the same bytes. "ends" are the byte
  offsets of the text at which the tokens end: a chunk ends at ends[s1 - 1] of the student, ends[t1 - 1] of the teacher.
  A side has "bos_id" and "stop_ids" for events beside the text, "prompt_ids" with --chat, and with --score "logp"
  and "entropy" (nats; null for a token that has none) and "stop_logp"; the text has "score" then.
"""


class _WithKeys(TyperCommand):
    """A command whose help ends with the keys of a configuration."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the keys."""
        super().format_help(ctx, formatter)
        from gold.config import describe

        terminal.show_lines(f"Keys of a configuration\n\n{describe()}")


class _WithFormats(TyperCommand):
    """A command whose help ends with what its picture and its JSON mean."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the formats."""
        super().format_help(ctx, formatter)
        terminal.show_lines(_FORMATS)


# What the system says where gold can do nothing about it: no room, no right, no such name, no more open files.
_OF_THE_SYSTEM = {
    *(
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    ),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
}


@contextmanager
def _told() -> Iterator[None]:
    """Errors that are no bugs become lines on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.show("interrupted", stream=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read has enough
        terminal.silence()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except BaseException as error:
        line = _line_of(error)
        if line is None:
            raise
        terminal.show_error(line)
        if isinstance(error, OSError) and error.filename is None:
            terminal.silence()
        raise SystemExit(1) from None


def _line_of(error: BaseException) -> object | None:
    """What is said of an error that is no bug of gold's; None for one that may be."""
    if isinstance(error, GoldError):
        return error
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    if isinstance(error, OSError):
        if error.errno not in _OF_THE_SYSTEM:
            return None
        return f"cannot write or read {error.filename or 'standard output'}: {error.strerror}"
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error):
        reason = " ".join(str(error).split())[:200]
        knobs = "train.micro_batch_size, evaluate.micro_batch_size and rollout.generation_batch_size"
        return f"out of memory{f': {reason}' if reason else ''}; {knobs} say how much is held at a time"
    if kind == "PanicException":  # of a library in Rust, and no Exception
        return f"a tokenizer failed in the library that runs it: {' '.join(str(error).split())[:300]}"
    return None


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.show(f"gold {gold.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    pass


@app.command(cls=_WithFormats)
def align(
    student: Annotated[str, typer.Option(metavar="SOURCE", help=_SOURCE, show_default=False)],
    teacher: Annotated[str, typer.Option(metavar="SOURCE", help=_SOURCE, show_default=False)],
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="the text itself; - or none: standard input", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="file that holds the text")
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option("--jsonl", metavar="FILE", help="JSON lines with `text`, each answered by JSON"),
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            "--chat", metavar="FILE", help="JSON list of messages; the last, the assistant's, is the text"
        ),
    ] = None,
    student_template_kwargs: Annotated[
        str | None,
        typer.Option(
            "--student-template-kwargs",
            metavar="JSON",
            help='what its chat template is given, as {"enable_thinking": false}',
        ),
    ] = None,
    teacher_template_kwargs: Annotated[
        str | None, typer.Option("--teacher-template-kwargs", metavar="JSON", help="the same of the teacher")
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            "--ids", metavar="IDS", help='the student\'s own ids, "1 2 3" or "[1, 2, 3]", canonical or not'
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print ids, byte ends and chunks as JSON")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="write a page to look at in a browser")
    ] = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score", help="log-probabilities of both models; the sources are folders with weights"
        ),
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="no colours, in a terminal either")] = False,
) -> None:
    """Show how two tokenizers cut one text, and the chunks on which they agree."""
    with _told():
        from gold.inspect.command import run_align

        run_align(
            text,
            student=student,
            teacher=teacher,
            file=file,
            jsonl=jsonl,
            chat=chat,
            template_kwargs=(student_template_kwargs, teacher_template_kwargs),
            ids=ids,
            as_json=as_json,
            html=html,
            color=not no_color,
            load_scorer=_load_scorer if score else None,
        )


def _load_scorer(student: str, teacher: str) -> Any:
    from gold.inspect.score import PairScorer

    return PairScorer.load(student, teacher)


@app.command()
def doctor(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT|CONFIG", help="folder, tokenizer.json or Hub id; or the YAML file of a run"
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Argument(metavar="TEACHER", help="folder, tokenizer.json or Hub id", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the checks as JSON")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="load both models and try them too")] = False,
    sequences: Annotated[
        int | None,
        typer.Option(
            "--sequences", min=1, help="in a forward pass; else the run's, or 8", show_default=False
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="of a sequence; else the run's, or 256", show_default=False),
    ] = None,
) -> None:
    """Check whether a pair can be trained and what stands in its way; exit code 1 if it cannot.

    Memory of a step, as estimated, in bytes:
    student: parameters × 4 × bytes of its dtype (weights, gradients, AdamW)
    teacher: parameters × bytes of its dtype
    activations: sequences × tokens × layers ×
    (9 hidden + 4 inner + 3 (queries + keys)) × 4
    logits: 6 blocks of at most 128 MiB
    """
    with _told():
        if teacher is None:
            from gold.build import diagnose_run

            report = diagnose_run(Path(student), weights=weights, sequences=sequences, tokens=tokens)
        else:
            from gold.doctor.report import diagnose, load_pair

            load = partial(load_pair, student, teacher) if weights else None
            report = diagnose(student, teacher, load=load, sequences=sequences or 8, tokens=tokens or 256)
        from gold.doctor.report import print_report

        print_report(report, as_json=as_json)
    if report.verdict == "fail":
        raise typer.Exit(1)


@app.command(cls=_WithKeys)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see the keys below")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint of the run folder")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove the run that is in the run folder first")
    ] = False,
    allow_changed: Annotated[
        bool,
        typer.Option(
            "--allow-changed",
            help="resume although keys, prompts or models have changed, and keep in environment.json which",
        ),
    ] = False,
) -> None:
    """Train a student from a teacher as a configuration says, into a run folder."""
    with _told():
        from gold.config import Config

        settings = Config.load(config, overrides or [])
        if resume and not overwrite:
            from gold.train.run_folder import ended

            if said := ended(settings.output, settings.to_dict(), settings.train.steps):
                if os.environ.get("RANK", "0") == "0":  # one of several processes tells
                    terminal.show(said)
                return
        from gold.build import train as run
        from gold.train.progress import for_terminal

        run(
            settings,
            resume=resume,
            overwrite=overwrite,
            allow_changed=allow_changed,
            progress=for_terminal(),
        )


@app.command("eval")
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file, or a run folder")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, samples included")] = False,
) -> None:
    """Measure a student on held-out prompts: accuracy, bits per byte, KL per byte, lengths."""
    with _told():
        from gold.build import evaluate_source
        from gold.train.progress import Quiet

        found = evaluate_source(source, overrides or [], Quiet())
        if as_json:
            terminal.show_json({"measures": found.measures, "samples": found.samples})
        else:
            terminal.show(*_measure_lines(found.measures))


def _measure_lines(measures: Mapping[str, float]) -> Iterator[str]:
    """Each measure in a line, with its 95 % interval where it has one."""
    for name, value in measures.items():
        if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in measures:
            continue
        line = f"{name:<22} {value:>9.4f}"
        if f"{name}_low" in measures:
            line += f"   95 % {measures[f'{name}_low']:.4f} to {measures[f'{name}_high']:.4f}"
        yield line


@app.command()
def objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="only this one", show_default=False)
    ] = None,
) -> None:
    """List what can be minimised: what each objective needs of a teacher, and its options with their defaults."""
    with _told():
        from gold.losses.describe import describe_objectives

        terminal.show(*describe_objectives(name))


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
) -> None:
    """Draw the learning curves of a run as PNG files."""
    with _told():
        from gold.inspect.plots import plot_run

        terminal.show(*plot_run(run))


@cache.command("build")
def cache_build(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of a run; its student is not looked at")
    ],
    overrides: Overrides = None,
) -> None:
    """Score the completions of a run's training prompts into teacher.cache.path; what is there is not asked again."""
    with _told():
        from gold.config import Config

        settings = Config.load(config, overrides or [])
        from gold.build import build_cache
        from gold.cache.command import summary, teller
        from gold.train.progress import Lines

        for teacher in build_cache(settings, Lines(), teller()):
            terminal.show(summary(teacher.cache))


Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a cache")]


@cache.command("info")
def cache_info(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
) -> None:
    """Say whose scores a cache holds, of how much text, and what they take."""
    with _told():
        from gold.cache.command import run_info

        run_info(folder, as_json)


@cache.command("verify")
def cache_verify(folder: Folder) -> None:
    """Read every byte of a cache and name what is damaged or cut short; exit code 1 if anything is."""
    with _told():
        from gold.cache.command import run_verify

        whole = run_verify(folder)
    if not whole:
        raise typer.Exit(1)


@cache.command("merge")
def cache_merge(
    into: Annotated[Path, typer.Argument(metavar="INTO", help="folder of a cache, new or not")],
    sources: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="caches of the same teacher")],
) -> None:
    """Add to a cache what it lacks of others; what is damaged is left out, and what is there twice taken once."""
    with _told():
        from gold.cache.command import run_merge

        run_merge(into, sources)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="run folder of the demo")] = Path(
        "runs/demo"
    ),
) -> None:
    """Make two tiny models with different tokenizers, distil one into the other, compare; offline."""
    with _told():
        from gold.demo.run import main as run

        run(out)


def main() -> None:
    """The `gold` command."""
    terminal.prepare()
    with _told():
        try:
            code = app(standalone_mode=False)
            sys.stdout.flush()
        except Exception as error:
            if not hasattr(error, "format_message"):  # of the reader of the command line: wrong usage
                sys.excepthook = terminal.show_traceback
                raise
            context = getattr(error, "ctx", None)
            asked = f"; try {context.command_path} --help" if context is not None else ""
            terminal.show_error(f"{error.format_message().rstrip('.')}{asked}")
            code = 2
    raise SystemExit(code if isinstance(code, int) else 0)
