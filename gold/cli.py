"""The command line. Commands import what they need when they run, so that asking for help stays quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import gold
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

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="changes, such as train.steps=30", show_default=False),
]


class _WithKeys(TyperCommand):
    """A command whose help ends with the keys of a configuration."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the keys."""
        super().format_help(ctx, formatter)
        from gold.config import describe

        print(f"Keys of a configuration\n\n{describe()}")


@contextmanager
def _told() -> Iterator[None]:
    """Errors of gold become lines on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        yield
    except GoldError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gold {gold.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    pass


@app.command(cls=_WithKeys)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see the keys below")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint of the run folder")
    ] = False,
) -> None:
    """Train a student from a teacher as a configuration says, into a run folder."""
    with _told():
        from gold.config import Config

        settings = Config.load(config, overrides or [])
        from gold.train import train as run

        run(settings, resume=resume)


@app.command("eval")
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file, or a run folder")],
    overrides: Overrides = None,
) -> None:
    """Measure a student on held-out prompts: accuracy, bits per byte, KL per byte, lengths."""
    with _told():
        from gold.evaluate import evaluate_command

        evaluate_command(source, overrides or [])


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
) -> None:
    """Draw the learning curves of a run as PNG files."""
    with _told():
        from gold.plots import plot_run

        for path in plot_run(run):
            print(path)


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
    app()
