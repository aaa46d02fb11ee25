"""What may import what, read from the source, and what importing loads, seen in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from support.tokenizers import byte_level_bpe, sentencepiece_bpe

import gold

ROOT = Path(gold.__file__).parent

# Heavy or optional packages, and the only modules that may import them.
HOME_OF = {
    "accelerate": ("gold.train.state", "gold.train.loop", "gold.train.preflight"),
    "bitsandbytes": ("gold.models.quantization", "gold.train.optimizer"),
    "datasets": ("gold.data.tables",),
    "gguf": ("gold.models.load",),
    "httpx2": ("gold.http",),
    "lm_eval": ("gold.harness",),
    "matplotlib": ("gold.inspect.plots", "gold.demo"),
    "peft": ("gold.models.adapters",),
    "pyarrow": ("gold.data.tables",),
    "pydantic": (
        *("gold.config", "gold.data_config", "gold.engine_config", "gold.environment_config"),
        *("gold.losses", "gold.schema", "gold.train.recipe"),
    ),
    "rapidfuzz": ("gold.tokenize.rewriting",),
    "reasoning_gym": ("gold.tasks",),
    "rich": (
        "gold.terminal",
        "gold.chat",
        "gold.inspect.prompts",
        "gold.inspect.terminal",
        "gold.doctor.report",
        "gold.train.progress",
    ),
    "tiktoken": ("gold.tokenize.convert.tiktoken",),
    "transformers": (
        "gold.models",
        "gold.rollout.hf",
        "gold.demo",
        "gold.environments.tools",
    ),  # models, generation, tiny models
    "triton": ("gold.kernels.triton",),
    "typer": ("gold.cli", "gold.cli_cache"),
    "vllm": ("gold.rollout.vllm_extension", "gold.rollout.weight_transfer"),
}

HEAVY = ("torch", "transformers", "accelerate")

# Layers, and what they never import.
FORBIDDEN_IN = {
    "gold.tokenize": (*HEAVY, "gold.bytes", "gold.align", "gold.kernels", "gold.models"),
    "gold.bytes": (*HEAVY, "gold.align", "gold.kernels", "gold.models"),
    "gold.align.chunks": (*HEAVY, "gold.kernels", "gold.models"),
    "gold.align.overlap": (*HEAVY, "gold.kernels", "gold.models"),
    "gold.align.decomposition": (*HEAVY, "gold.kernels", "gold.models"),
    "gold.align.batch": (
        "transformers",
        "accelerate",
        "gold.models",
        "gold.losses",
        "gold.rollout",
        "gold.teachers",
    ),
    "gold.kernels": ("transformers", "tokenizers", "accelerate", "gold.align", "gold.models"),
    "gold.exact": (
        *("transformers", "tokenizers", "accelerate"),
        *("gold.align", "gold.models", "gold.losses", "gold.rollout", "gold.teachers"),
    ),
    # A model knows the bytes of its ids and gives logits on demand; it knows nothing of alignment or losses.
    "gold.models": (
        "gold.align",
        "gold.bytes",
        "gold.kernels.cpu",
        "gold.kernels.triton",
        "gold.kernels.reference",
        "gold.losses",
        "gold.rollout",
        "gold.teachers",
    ),
    "gold.losses": ("gold.models", "gold.tokenize", "transformers", "tokenizers"),
    "gold.cache": ("torch", "transformers", "gold.align", "gold.kernels", "gold.models"),
    "gold.rollout": ("gold.kernels", "gold.losses", "gold.teachers", "gold.train"),
    "gold.teachers": ("gold.train", "gold.evaluate", "gold.doctor"),
    "gold.models.files": (
        "torch",
        "accelerate",
        "tokenizers",
        "gold.align",
        "gold.kernels",
        "gold.models.load",
        "gold.models.pretrained",
        "gold.models.hidden_states",
        "gold.models.padding",
    ),
    "gold.data": ("torch", "transformers"),
    "gold.prompt_order": ("torch", "transformers"),
    "gold.tasks": ("torch", "transformers"),
    "gold.doctor": ("gold.config", "gold.build", "gold.run", "gold.train"),
    "gold.comparison": ("gold.train",),
    "gold.evaluate": ("gold.train",),
    "gold.train": ("gold.config", "gold.build", "gold.run"),
}

# The only modules that see a configuration; they hand plain values on.
SEE_CONFIG = (
    *("gold", "gold.cli", "gold.cli_cache", "gold.build", "gold.build_data", "gold.run", "gold.starter"),
    *("gold.data_command", "gold.demo", "gold.diagnose"),
)

# Needed only where the thing itself is needed, so never when a module is loaded.
LAZY = (
    *("bitsandbytes", "datasets", "huggingface_hub", "lm_eval", "matplotlib"),
    *("peft", "pyarrow", "rapidfuzz", "reasoning_gym", "tiktoken"),
)

NAMELESS = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}


class Import(NamedTuple):
    importer: str
    imported: str
    when: str  # "loaded", "called" or "checked" (TYPE_CHECKING)
    line: int


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def modules() -> dict[str, Path]:
    paths = sorted(ROOT.rglob("*.py"))
    names = [".".join(("gold", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports_in(source: str, importer: str, package: bool = False) -> Iterator[Import]:
    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(importer, alias.name, when, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = importer.split(".")
            above = parts[: len(parts) - node.level + package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield Import(importer, origin, when, node.lineno)
            yield from (Import(importer, f"{origin}.{alias.name}", when, node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, "checked")
            for child in node.orelse:
                yield from visit(child, when)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, "called" if function and when == "loaded" else when)

    yield from visit(ast.parse(source), "loaded")


IMPORTS = [
    one
    for name, path in modules().items()
    for one in imports_in(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
]


def told(found: list[Import]) -> str:
    return "\n".join(f"{one.importer}:{one.line} imports {one.imported} when {one.when}" for one in found)


# The reader of imports itself


def test_imports_are_told_apart_by_when_they_run() -> None:
    source = """
from typing import TYPE_CHECKING
import a.b
if TYPE_CHECKING:
    import c
else:
    import d
def f():
    from e import g
class H:
    from . import i
    def j(self): import k
"""
    found = {(one.imported, one.when) for one in imports_in(source, "gold.x.y")}
    assert found == {
        ("typing", "loaded"),
        ("typing.TYPE_CHECKING", "loaded"),
        ("a.b", "loaded"),
        ("c", "checked"),
        ("d", "loaded"),
        ("e", "called"),
        ("e.g", "called"),
        ("gold.x", "loaded"),
        ("gold.x.i", "loaded"),
        ("k", "called"),
    }
    assert {one.imported for one in imports_in("from .z import q", "gold.x", package=True)} == {
        "gold.x.z",
        "gold.x.z.q",
    }


# Layers


@pytest.mark.parametrize("package", HOME_OF)
def test_a_package_is_imported_only_at_home(package: str) -> None:
    strangers = [
        one
        for one in IMPORTS
        if below(one.imported, package)
        and one.when != "checked"
        and not any(below(one.importer, home) for home in HOME_OF[package])
    ]
    assert not strangers, told(strangers)


@pytest.mark.parametrize("layer", FORBIDDEN_IN)
def test_a_layer_does_not_reach_across(layer: str) -> None:
    across = [
        one
        for one in IMPORTS
        if below(one.importer, layer)
        and one.when != "checked"
        and any(below(one.imported, other) for other in FORBIDDEN_IN[layer])
    ]
    assert not across, told(across)


def test_only_the_command_line_and_the_loops_see_a_configuration() -> None:
    seen = [
        one
        for one in IMPORTS
        if below(one.imported, "gold.config")
        and one.importer != "gold.config"
        and not any(
            one.importer == known or (known != "gold" and below(one.importer, known)) for known in SEE_CONFIG
        )
    ]
    assert not seen, told(seen)


@pytest.mark.parametrize("package", LAZY)
def test_what_is_rarely_needed_is_not_loaded_with_a_module(package: str) -> None:
    eager = [one for one in IMPORTS if below(one.imported, package) and one.when == "loaded"]
    assert not eager, told(eager)


def test_modules_load_one_another_in_one_direction() -> None:
    known = modules()
    needs: dict[str, set[str]] = {name: set() for name in known}
    for one in IMPORTS:
        if one.when == "loaded" and one.imported in known and one.imported != one.importer:
            needs[one.importer].add(one.imported)
    # Python loads a package before its modules, so a module that names its package does not need it.
    for name, path in known.items():
        if path.name == "__init__.py":
            for child in needs:
                if below(child, name) and child != name:
                    needs[child].discard(name)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another: {' -> '.join(error.args[1])}")


def test_modules_are_named_for_what_they_hold() -> None:
    assert not {name for name in modules() if name.split(".")[-1] in NAMELESS}


def concrete_teachers() -> set[str]:
    """The subclasses of Teacher in gold.teachers."""
    classes = [
        (node.name, {base.id for base in node.bases if isinstance(base, ast.Name)})
        for name, path in modules().items()
        if below(name, "gold.teachers")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    found = {"Teacher"}
    while new := {name for name, bases in classes if bases & found} - found:
        found |= new
    return found - {"Teacher"}


def tells_apart(source: str, classes: set[str]) -> list[int]:
    """The lines on which a class is asked for: isinstance, issubclass, a case of match."""
    asked = [
        node.args[1] if isinstance(node, ast.Call) else node.cls
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.MatchClass)
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        )
    ]
    return [
        each.lineno
        for each in asked
        for part in ast.walk(each)
        if getattr(part, "id", None) in classes or getattr(part, "attr", None) in classes
    ]


def test_no_teacher_is_treated_by_its_class() -> None:
    classes = concrete_teachers()
    assert {"CachedTeacher", "LocalTeacher", "SelfTeacher", "ServedTeacher", "AbsentTeacher"} <= classes
    assert tells_apart("isinstance(a, int | t.LocalTeacher)", classes) == [1]
    found = {
        name: lines
        for name, path in modules().items()
        if not below(name, "gold.teachers")
        and (lines := tells_apart(path.read_text(encoding="utf-8"), classes))
    }
    assert not found


# Sizes

MOST_LINES_OF_A_MODULE = 500
MOST_LINES_OF_A_FUNCTION = 60

# What is larger for now; remove an entry once it is no longer needed.
LARGE_MODULES: set[str] = set()
LARGE_FUNCTIONS: set[str] = set()


def functions_in(source: str) -> Iterator[tuple[str, int]]:
    """The functions of a module and of its classes with their lines, from the first decorator to the end."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name, first = f"{prefix}{child.name}", min(d.lineno for d in (*child.decorator_list, child))
                yield name, (child.end_lineno or first) - first + 1
                yield from visit(child, f"{name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            else:
                yield from visit(child, prefix)

    yield from visit(ast.parse(source), "")


def test_no_module_is_large() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    large = {name for name, count in lines.items() if count > MOST_LINES_OF_A_MODULE}
    assert large <= LARGE_MODULES, {name: lines[name] for name in large - LARGE_MODULES}


def test_no_function_is_large() -> None:
    large = {
        f"{module}:{name}": lines
        for module, path in modules().items()
        for name, lines in functions_in(path.read_text(encoding="utf-8"))
        if lines > MOST_LINES_OF_A_FUNCTION and name not in LARGE_FUNCTIONS
    }
    assert not large


# Fresh interpreters


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(); print(' '.join(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_gold_loads_nothing_heavy() -> None:
    heavy = {
        "torch",
        "transformers",
        "accelerate",
        "numba",
        "numpy",
        "tokenizers",
        "pydantic",
        "yaml",
        "typer",
    }
    assert not loaded_by("import gold") & heavy


@pytest.mark.parametrize(
    "module", ["gold.config", "gold.data_config", "gold.schema", "gold.sections", "gold.train.recipe"]
)
def test_importing_the_configuration_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "accelerate", "numba", "numpy", "tokenizers"}
    assert not loaded_by(f"import {module}; from gold import Config, Recipe, Term; Recipe(steps=3)") & heavy


def test_a_misspelt_key_is_refused_before_anything_heavy_is_loaded() -> None:
    code = "from gold import Config\ntry: Config.model_validate({'trian': {}})\nexcept ValueError: pass"
    assert not loaded_by(code) & {"torch", "transformers", "numba", "numpy", "tokenizers"}


HELP = "import gold.cli, sys; sys.argv = ['gold', {}]\ntry: gold.cli.main()\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    "asked", ["'--help'", "'--version'", "'train', '--help'", "'align', '--help'", "'doctor', '--help'"]
)
def test_asking_for_help_loads_nothing_heavy(asked: str) -> None:
    heavy = {"torch", "transformers", "accelerate", "numba", "numpy", "tokenizers", "matplotlib"}
    assert not loaded_by(HELP.format(asked)) & heavy


def test_aligning_loads_no_model_library() -> None:
    light = [
        name
        for name in modules()
        if any(below(name, room) for room in ("gold.align", "gold.bytes", "gold.tokenize"))
        and name not in ("gold.align.batch", "gold.align.model_inputs")
    ]
    heavy = {"torch", "transformers", "accelerate", "rapidfuzz", "huggingface_hub"}
    loaded_by(
        f"import sys\nfrom importlib import import_module\nfor name in {light}:\n    import_module(name)\n"
        f"    assert not {heavy} & set(sys.modules), (name, {heavy} & set(sys.modules))"
    )


def test_the_align_command_loads_no_model_library(tmp_path: Path) -> None:
    arguments = ["gold", "align", "caf\u00e9 24 +7 =", "--json"]
    for side, make in (("--student", byte_level_bpe), ("--teacher", sentencepiece_bpe)):
        make().save(str(tmp_path / f"{side}.json"))
        arguments += [side, str(tmp_path / f"{side}.json")]
    loaded = loaded_by(
        f"import gold.cli, sys; sys.argv = {arguments}\ntry: gold.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    assert "tokenizers" in loaded
    assert not loaded & {"torch", "transformers", "accelerate"}


# Public names


@pytest.mark.parametrize("name", sorted(set(gold.__all__) & set(gold._MODULE_OF)))
def test_a_public_name_is_where_it_says(name: str) -> None:
    module = gold._MODULE_OF[name]
    if find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    assert getattr(gold, name) is getattr(sys.modules[module], name)


def test_no_public_name_hides_a_module() -> None:
    assert not {f"gold.{name}" for name in gold.__all__} & modules().keys()
    assert set(gold._MODULE_OF) < set(gold.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gold' has no attribute 'distil'"):
        gold.distil  # noqa: B018
    assert set(gold.__all__) <= set(dir(gold))
