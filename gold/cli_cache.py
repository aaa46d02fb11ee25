"""The command line of `gold cache`, and the arguments that it shares with other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gold import terminal

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="changes, such as train.steps=30", show_default=False),
]
CacheFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a cache", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

cache = typer.Typer(
    help="Keep a teacher's scores of texts in a folder, for students with any tokenizer to learn from.",
    no_args_is_help=True,
)


@cache.command("build")
def cache_build(config: ConfigFile, overrides: Overrides = None) -> None:
    """Score the completions of a run's training prompts that are not yet in teacher.cache.path, and store them there.

    With rollout.policy=initial, the student first writes its completions to rollout.completions, and these are scored;
    otherwise the student of the configuration is not needed.
    """
    from gold.config import Config

    settings = Config.load(config, overrides or [])
    from gold.cache.command import summary, teller
    from gold.run import build_cache
    from gold.train.progress import Lines

    for teacher in build_cache(settings, Lines(), teller()):
        terminal.show(summary(teacher.cache))


@cache.command("info")
def cache_info(folder: CacheFolder, as_json: AsJson = False) -> None:
    """Show the teacher of a cache, how many texts it holds, and its size."""
    from gold.cache.command import run_info

    run_info(folder, as_json)


@cache.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Read every byte of a cache and list damaged or truncated parts; exit code 1 if there are any."""
    from gold.cache.command import run_verify

    if not run_verify(folder):
        raise typer.Exit(1)


@cache.command("merge")
def cache_merge(
    into: Annotated[Path, typer.Argument(metavar="INTO", help="folder of a cache, new or not")],
    sources: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="caches of the same teacher")],
) -> None:
    """Add the contents of other caches to a cache, without damaged records and duplicates."""
    from gold.cache.command import run_merge

    run_merge(into, sources)
