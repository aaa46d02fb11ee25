"""The pages: their commands parse, their YAML is of a run, their links lead somewhere, and they become a site."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from gold.cli import app
from gold.config import Config
from gold.schema import keys_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]
RUN = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "output": "o"}
KEYS = {key for key, *_ in keys_of(Config)}


def fences(page: Path, *languages: str) -> list[str]:
    """The contents of a page's fenced blocks of these languages; "" for one without."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every command line that runs gold."""
    found = []
    for block in fences(page, "", "console", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if "gold " in line else []
            if words[:1] == ["gold"]:
                found.append(words[1:])
            elif words[:1] in (["torchrun"], ["accelerate"]) and "gold" in words:
                found.append(words[words.index("gold") + 1 :])
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a command line, which is not run."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("gold", [], resilient_parsing=True)
    while hasattr(command, "get_command"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, name
    return dict(command.make_context(name, words).params)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_line_parses(page: Path) -> None:
    for words in commands(page):
        if "--help" in words:
            continue
        parameters = parsed(list(words))
        for override in [
            w for w in (parameters.get("overrides") or parameters.get("others") or []) if "=" in w
        ]:
            key = override.partition("=")[0]
            if not key.startswith("teachers."):  # names of teachers are free
                assert key in KEYS, f"{page.name}: gold {' '.join(words)}"


def test_command_lines_are_found_and_wrong_ones_refused() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20
    for wrong in (
        ["trian", "x.yaml"],
        ["train"],
        ["eval", "x", "--jsn"],
        ["chat", "x", "--max-new-tokens", "many"],
    ):
        with pytest.raises((AssertionError, Exception)):
            parsed(wrong)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_yaml_block_is_a_configuration_or_part_of_one(page: Path, tmp_path: Path) -> None:
    for block in fences(page, "yaml"):
        given = yaml.safe_load(block)
        assert isinstance(given, dict), block
        if "doc_to_text" in given:  # a task of lm-eval
            continue
        missing = {key: value for key, value in RUN.items() if key not in given}
        if "teachers" in given:
            missing.pop("teacher", None)
        path = [] if "path" in given.get("student", RUN["student"]) else ["student.path=s"]
        file = tmp_path / "run.yaml"
        file.write_text((yaml.safe_dump(missing) if missing else "") + block, encoding="utf-8")
        Config.load(file, path)


# The site


def site() -> ModuleType:
    """dev/site.py."""
    specification = importlib.util.spec_from_file_location("gold_site", ROOT / "dev" / "site.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_links_of_the_repository_become_links_of_the_site(tmp_path: Path) -> None:
    module = site()
    places = module.pages()
    text = (
        "[a](docs/runs.md#the-report) [`b`](gold/cli.py) [c](https://x.y/z) [d](#e) [f](tests/)\n"
        "![p](benchmarks/results/demo.png)\n\n```\n[kept](docs/runs.md)\n```\n"
    )
    told = module.rewritten(text, "README.md", places, "", tmp_path)
    assert told == (
        "[a](runs.md#the-report) `b` [c](https://x.y/z) [d](#e) f\n"
        "![p](benchmarks/results/demo.png)\n\n```\n[kept](docs/runs.md)\n```\n"
    )
    assert (tmp_path / "benchmarks" / "results" / "demo.png").is_file()
    back = module.rewritten("[o](../README.md) [s](../gold)", "docs/runs.md", places, "https://h/r", tmp_path)
    assert back == "[o](index.md) [s](https://h/r/gold)"
    with pytest.raises(SystemExit, match=r"docs/runs\.md: links to nowhere\.md"):
        module.rewritten("[x](nowhere.md)", "docs/runs.md", places, "", tmp_path)


def test_every_page_and_every_public_name_is_in_the_site(tmp_path: Path) -> None:
    module = site()
    module.write_pages(tmp_path, "")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.md")}
    assert {page.name for page in PAGES if page.name != "README.md"} <= written
    assert "::: gold.train.loop.distill" in (tmp_path / "api" / "running.md").read_text(encoding="utf-8")


def test_the_site_builds_without_a_broken_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zensical")
    module = site()
    monkeypatch.setattr("sys.argv", ["site.py", str(tmp_path / "docs")])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    page = (tmp_path / "docs" / "site" / "api" / "running" / "index.html").read_text(encoding="utf-8")
    assert "num_generations" in page
    assert "Trains" in page
