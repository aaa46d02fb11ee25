"""The command line. Commands import what they need when they run, so that help is fast."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import gold
from gold import terminal
from gold.cli_cache import AsJson, Overrides, cache
from gold.error_lines import line_of


@contextmanager
def _reported() -> Iterator[None]:
    """Prints errors that are not bugs as lines on stderr with exit code 1; Ctrl-C is exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.show("interrupted", stream=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has closed it
        terminal.silence()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except BaseException as error:
        line = line_of(error)
        if line is None:
            raise
        terminal.show_error(line)
        if isinstance(error, OSError) and error.filename is None:
            terminal.silence()
        raise SystemExit(1) from None


def _formats() -> str:
    from gold.inspect.formats import FORMATS

    return FORMATS


def _keys() -> str:
    from gold.config import describe

    return f"Keys of a configuration\n\n{describe()}"


_APPENDIX: dict[str | None, Callable[[], str]] = {"align": _formats, "train": _keys}


class _WithAppendix(TyperCommand):
    """A command whose help ends with an appendix that keeps its line breaks."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the appendix."""
        super().format_help(ctx, formatter)
        terminal.show_lines(_APPENDIX[self.name]())


class _Group(TyperGroup):
    """The command group, which reports errors."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _reported():
            return super().invoke(ctx)


app = typer.Typer(
    name="gold",
    cls=_Group,
    help="On-policy distillation between language models that do not share a tokenizer.",
    no_args_is_help=True,
    add_completion=False,
    # An error that gold raises is one line; any other has Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache, name="cache")

_SOURCE = "folder, tokenizer.json, GGUF file, SentencePiece model, tekken.json, tiktoken:NAME or Hub id"
Source = Annotated[str, typer.Option(metavar="SOURCE", help=_SOURCE, show_default=False)]


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


@app.command(cls=_WithAppendix)
def align(
    student: Source,
    teacher: Source,
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="the text; - or nothing: standard input", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="file that holds the text")] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines with `text`; one line of JSON is printed for each"),
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON list of messages; each turn of the assistant is a text"),
    ] = None,
    student_template_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='arguments of the student\'s chat template, as {"enable_thinking": false}'
        ),
    ] = None,
    teacher_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="arguments of the teacher's chat template")
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(metavar="IDS", help='the student\'s ids, "1 2 3" or "[1, 2, 3]", canonical or not'),
    ] = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write an HTML page")] = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score", help="log-probabilities of both models; the sources are folders with weights"
        ),
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="no colours")] = False,
) -> None:
    """Show how two tokenizers split one text, and the chunks on which they agree."""
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
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEACHER|KEY=VALUE...",
            help="folder, tokenizer.json or Hub id; or changes of a configuration, such as train.sharding=fsdp",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    weights: Annotated[bool, typer.Option("--weights", help="load both models and try them too")] = False,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="of a forward pass; default: the run's, or 8", show_default=False),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="of a sequence; default: the run's, or 256", show_default=False)
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="of a run", show_default=False)] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="GIB", help="of each GPU: what a run needs of it", show_default=False),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-3, help="TFLOP/s that a GPU reaches", show_default=False)
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=1e-3, help="GB/s of a GPU's memory", show_default=False)
    ] = None,
) -> None:
    """Check whether a pair can be trained, and if not, why; exit code 1 if it cannot.

    With --memory also the memory of a run by part and phase, the changes that make it fit, and the work of a step.
    """
    from gold.doctor.report import print_report
    from gold.doctor_command import diagnose_source

    given = others or []
    if len(given) > 1 and not all("=" in each for each in given):
        raise typer.BadParameter(f"expected one TEACHER, got {' '.join(given)}")
    report = diagnose_source(
        student,
        given,
        weights=weights,
        sequences=sequences,
        tokens=tokens,
        memory=memory,
        hardware={"gpus": gpus, "tflops": tflops, "bandwidth": bandwidth},
    )
    print_report(report, as_json=as_json)
    if report.verdict == "fail":
        raise typer.Exit(1)


@app.command()
def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE|CONFIG", help="file, folder or Hub id of a data set; or the YAML file of a run"
        ),
    ],
    overrides: Overrides = None,
    student: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="a model that reads the prompts")
    ] = None,
    teacher: Annotated[list[str] | None, typer.Option(metavar="SOURCE", help="another; repeatable")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=COLUMN", help="as prompt=text; id= reads none; repeatable"),
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="such as test or train[:1000]")] = None,
    subset: Annotated[str | None, typer.Option(help="subset of a data set on the Hub")] = None,
    revision: Annotated[str | None, typer.Option(help="commit, tag or branch there")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="keep nothing of it on disk")] = False,
    rows: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what is read of a data set: its columns, lengths in tokens, and rows as each model reads them."""
    from gold.data_command import run_data

    run_data(
        source,
        overrides or [],
        student=student,
        teachers=teacher or [],
        columns=columns or [],
        of_source={"split": split, "subset": subset, "revision": revision, "streaming": streaming},
        rows=rows,
        as_json=as_json,
    )


@app.command(cls=_WithAppendix)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see the keys below")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the last checkpoint of the run folder")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove the run that is in the run folder first")
    ] = False,
    allow_changed: Annotated[
        bool,
        typer.Option(
            "--allow-changed",
            help="resume although keys, prompts or models have changed; environment.json records which",
        ),
    ] = False,
) -> None:
    """Train the student of a configuration; everything is written to its run folder."""
    from gold.config import Config

    settings = Config.load(config, overrides or [])
    if resume and not overwrite:
        from gold.train.run_folder import ended

        if said := ended(settings.output, settings.to_dict(), settings.train.steps):
            if os.environ.get("RANK", "0") == "0":  # one of several processes
                terminal.show(said)
            return
    from gold.train.progress import for_terminal

    shown = for_terminal(f"gold {gold.__version__}: loading torch and transformers")
    from gold.run import train as run

    run(settings, resume=resume, overwrite=overwrite, allow_changed=allow_changed, progress=shown)


@app.command("eval")
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(metavar="CONFIG|RUN", help="YAML file, or a run folder; with --tasks also a model"),
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="tasks of lm-eval instead, such as gsm8k,ifeval")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="further tasks of lm-eval, as YAML files")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first documents of each task")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="as a chat")] = False,
) -> None:
    """Measure a student on held-out prompts: accuracy, bits per byte, KL per byte, lengths.

    With --tasks the tasks of lm-eval: a run's student before and after beside each other, with standard errors.
    """
    from gold.inspect.measures import measure_lines, task_lines

    if tasks is not None:
        from gold.run import evaluate_tasks

        asked = tasks, overrides or [], task_path, limit, apply_chat_template
        scores = evaluate_tasks(str(source), *asked, note=terminal.show_note)
        terminal.show_json(scores) if as_json else terminal.show(*task_lines(scores))
        return
    of_tasks = {"--task-path": task_path, "--limit": limit, "--apply-chat-template": apply_chat_template}
    if given := [name for name, value in of_tasks.items() if value]:
        raise typer.BadParameter("it needs --tasks", param_hint=given[0])
    from gold.run import evaluate_source
    from gold.train.progress import Lines

    found = evaluate_source(source, overrides or [], Lines(sys.stderr))
    if as_json:
        terminal.show_json({"measures": found.measures, "samples": found.samples})
    else:
        terminal.show(*measure_lines(found.measures))


@app.command()
def objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="only this one", show_default=False)
    ] = None,
) -> None:
    """List the objectives: what each needs of a teacher, and its options with their defaults."""
    from gold.losses.describe import describe_objectives

    terminal.show(*describe_objectives(name))


@app.command()
def plot(run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]) -> None:
    """Draw the learning curves of a run as PNG files."""
    from gold.inspect.plots import plot_run

    terminal.show(*plot_run(run))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]) -> None:
    """Write report.html of a run again, from the files in its folder; a run writes it by itself."""
    from gold.inspect.report import write_report

    terminal.show(write_report(run))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="run folders")],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write a page with the table and the curves of all runs"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: final measures with 95 % intervals, steps, time, and the keys of the configuration that differ."""
    from gold.inspect.compare import run_compare

    run_compare(runs, html, as_json)


@app.command()
def chat(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="run folder, model folder or Hub id")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="ask this, print the answers and end; repeatable"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="student, teacher or start; repeatable")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="system message")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="continue the text: no chat template, no earlier turns")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most probable token")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk with a run's student, its teacher and the student it started from, beside each other."""
    from gold.chat import Chat, needs_plain, run_chat
    from gold.rollout.types import Sampling
    from gold.run import speakers

    if as_json and not prompt:
        raise typer.BadParameter("it needs --prompt", param_hint="--json")
    no_system = typer.BadParameter("a text that is continued has no system message", param_hint="--system")
    if plain and system is not None:
        raise no_system
    models = speakers(source, only or [], terminal.show_note)
    if not plain and needs_plain(models):
        if system is not None:
            raise no_system
        plain = True
        terminal.show_note("the student has no chat template: texts are continued, each alone")
    sampling = Sampling(max_new_tokens, temperature, top_p)
    run_chat(Chat(models, sampling, seed, plain, system), prompt or [], as_json)


@app.command()
def init(
    kind: Annotated[
        str, typer.Argument(metavar="demo|chat|reasoning|lora", help="what the run is to be")
    ] = "demo",
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="default: the kind's name", show_default=False)
    ] = None,
    student: Annotated[str | None, typer.Option(metavar="MODEL", help="folder, GGUF file or Hub id")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="folder, GGUF file or Hub id")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the files that it makes")] = False,
) -> None:
    """Make a folder with a commented configuration, prompts to begin with, and the next commands."""
    from gold.starter import make_starter

    place = folder or Path(kind)
    commands = make_starter(kind, place, student, teacher, overwrite)
    terminal.show(f"made {place}; next:", *(f"  {command}" for command in commands))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="run folder of the demo")] = Path("runs/demo"),
) -> None:
    """Train two tiny models with different tokenizers, distil one into the other, and compare; offline."""
    from gold.demo.run import main as run

    run(out)


def main() -> None:
    """The `gold` command."""
    terminal.prepare()
    with _reported():
        try:
            code = app(standalone_mode=False, prog_name="gold")
            sys.stdout.flush()
        except Exception as error:
            if not hasattr(error, "format_message"):  # everything except usage errors
                sys.excepthook = terminal.show_traceback
                raise
            context = getattr(error, "ctx", None)
            hint = f"; try {context.command_path} --help" if context is not None else ""
            if message := error.format_message().rstrip("."):  # without a command, the help is printed
                terminal.show_error(f"{message}{hint}")
            code = 2
    raise SystemExit(code if isinstance(code, int) else 0)
