"""Procedural tasks: generated prompts, and a verifier that scores completions.

gold's own tasks are in OWN_TASKS; every other name is a task of reasoning-gym (countdown, chain_sum, gsm_symbolic, …;
https://github.com/open-thought/reasoning-gym), whose questions and verifiers are used unchanged.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol, SupportsFloat, cast

from gold.data import Prompt
from gold.errors import ConfigError, DataError, GoldError, did_you_mean

SPLITS = ("train", "heldout")


class Task(Protocol):
    """Prompts and their verifier."""

    @property
    def name(self) -> str:
        """The name for `load_task`."""
        ...

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """`count` distinct prompts of a split, "train" or "heldout"; no prompt is in both, for any seeds."""
        ...

    def score(self, prompt: Prompt, completion: str) -> float:
        """The score of a completion, from 0 (wrong) to 1 (right)."""
        ...


def score_of(given: object) -> float:
    """A score of somebody's code as a float: of a number, a truth value, or a scalar array or tensor.

    Raises:
        DataError: it is no finite number; the message completes "the verifier scored".
    """
    if isinstance(given, SupportsFloat):
        with contextlib.suppress(ArithmeticError, TypeError, ValueError, RuntimeError):
            if math.isfinite(found := float(given)):
                return found
    raise DataError(f"{given!r:.80}; expected a number from 0 to 1")


OWN_TASKS: dict[str, str | Callable[..., Task]] = {
    "running_sums": "gold.demo.running_sums:RunningSums",
    "calculator": "gold.demo.calculator:Calculator",
    "verifiers": "gold.environments.of_verifiers:VerifiersEnvironment",
}
"""Tasks by name: a class, or ``module:class`` to import on demand."""


def load_task(name: str, **options: Any) -> Task:
    """The task with this name and these options.

    Raises:
        ConfigError: an unknown name, option or value, or reasoning-gym is needed and not installed.
    """
    if name not in OWN_TASKS:
        return ReasoningGym(name, **options)
    kind = OWN_TASKS[name]
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = cast(Callable[..., Task], getattr(importlib.import_module(module), attribute))
    _check_options(name, options, inspect.signature(kind).parameters)
    try:
        return kind(**options)
    except GoldError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise _bad_option(name, error) from error


class ReasoningGym:
    """A task of reasoning-gym: its question as a user message, its `score_answer` on the extracted answer.

    The split of a question follows from a hash of its text (one in four is held out), so the two splits never share a
    question, for any seeds and counts.

    Raises:
        ConfigError: see `load_task`.
    """

    def __init__(self, name: str, **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                # Of a library below it, as often as Python compiles that one.
                warnings.simplefilter("ignore", SyntaxWarning)
                from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigError(
                f"task {name!r} is not one of gold's own ({', '.join(OWN_TASKS)}), and those of reasoning-gym need it "
                "installed: pip install 'gold-distill[tasks]'"
            ) from error
        if name not in DATASETS or name in _WITHOUT_USE:
            known = {*OWN_TASKS, *DATASETS}.difference(_WITHOUT_USE)
            raise ConfigError(f"unknown task {name!r}{did_you_mean(name, known)}")
        if name in _HASH_SEEDED and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            raise ConfigError(
                f"task {name!r}: its questions depend on Python's hash seed and would differ at every start; "
                "set PYTHONHASHSEED=0 in the environment"
            )
        self.name = name
        self._dataset_type, self._config_type = DATASETS[name]
        for option in options.keys() & {"seed", "size"}:
            raise ConfigError(
                f"task {name!r}: {option!r} is no option; the seed and the counts have their own keys"
            )
        fields = {f.name: f for f in dataclasses.fields(self._config_type) if f.name not in ("seed", "size")}
        _check_options(name, options, fields)
        # YAML has lists but no tuples.
        self._options = {
            option: tuple(value) if isinstance(value, list) and _is_tuple(fields[option]) else value
            for option, value in options.items()
        }
        self._verifier = self._dataset(seed=0, size=1)

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """`count` distinct questions of a split; a larger count begins with those of a smaller one.

        Raises:
            ConfigError: an unknown split, or a count below 1.
            DataError: the task does not have that many distinct questions with these options.
        """
        if split not in SPLITS or count < 1:
            raise ConfigError(
                f"expected a split of {' or '.join(SPLITS)} and a count of 1 or more: {split}, {count}"
            )
        found: dict[str, Prompt] = {}
        dataset: Any = None
        tried = 0
        while tried < 200 * (len(found) + 10):
            block, index = divmod(tried, _BLOCK)
            if index == 0:
                dataset = self._dataset(_derived_seed(self.name, split, seed, block), _BLOCK)
            entry = dataset[index]
            tried += 1
            digest = hashlib.sha256(entry["question"].encode("utf-8", "surrogatepass")).hexdigest()
            if _is_heldout(digest) == (split == "heldout") and digest not in found:
                message = {"role": "user", "content": entry["question"]}
                found[digest] = Prompt(f"{self.name}-{digest[:16]}", messages=(message,), reference=entry)
                if len(found) == count:
                    return list(found.values())
        raise DataError(
            f"task {self.name!r} gave only {len(found)} distinct {split} questions in {tried} tries, "
            f"{count} were asked for; ask for fewer, or widen its options"
        )

    def score(self, prompt: Prompt, completion: str) -> float:
        """The dataset's own score of the answer in a completion, from 0 to 1; some give partial credit.

        See `extract_answer`. Verifiers that evaluate the answer as an expression receive it only if it is a plain one.

        Raises:
            DataError: the prompt is not one of this task's.
        """
        entry = prompt.reference
        if not isinstance(entry, dict) or "metadata" not in entry:
            raise DataError(f"prompt {prompt.key} holds no question of task {self.name!r}")
        answer = extract_answer(completion)
        plain = _PLAIN_ANSWERS.get(self.name)
        try:
            score = self._verifier.score_answer(answer if plain is None or plain(answer) else None, entry)
        except Exception:
            # If a verifier raises an error on an answer, the answer counts as wrong.
            return 0.0
        return min(1.0, max(0.0, float(score)))

    def _dataset(self, seed: int, size: int) -> Any:
        try:
            config = self._config_type(seed=seed, size=size, **self._options)
            if hasattr(config, "validate"):
                config.validate()
            return self._dataset_type(config=config)
        except (AssertionError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise _bad_option(self.name, error) from error


def extract_answer(completion: str) -> str:
    """The answer in a completion, without surrounding white space.

    The text after the last `Answer:` (in any case) or between the last `<answer>` and its `</answer>`, whichever comes
    later; without either, the last line that is not empty. A pair of `**` around it is removed.
    """
    markers = list(re.finditer(r"\banswer\s*:(?:\*\*)?|<answer>", completion, re.IGNORECASE))
    if markers:
        answer = completion[markers[-1].end() :]
        if markers[-1].group().startswith("<"):
            answer = re.split(r"</answer>", answer, maxsplit=1, flags=re.IGNORECASE)[0]
        answer = answer.strip()
    else:
        lines = [line.strip() for line in completion.splitlines() if line.strip()]
        answer = lines[-1] if lines else ""
    if len(answer) > 4 and answer.startswith("**") and answer.endswith("**"):
        answer = answer[2:-2].strip()
    return answer


# Large numbers of questions are generated in blocks of this size, each with its own seed.
_BLOCK = 500
# It mixes other tasks; a run has one.
_WITHOUT_USE = frozenset({"composite"})
# Their generators iterate over sets of strings.
_HASH_SEEDED = frozenset({"isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note"})


def _is_tuple(field: Any) -> bool:
    """True if the default of a dataclass field is a tuple."""
    return isinstance(
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory(), tuple
    )


def _is_heldout(digest: str) -> bool:
    return int(digest[:8], 16) % 4 == 0


def _derived_seed(*parts: object) -> int:
    # Adjacent seeds would overlap: reasoning-gym generates question i of seed s from s + i.
    return int(hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()[:8], 16) >> 1


# Some verifiers pass the answer to eval, or to sympy, which does the same. Model output must not be executed as a
# program, nor block the process for hours with 9**9**9.


def _is_plain_arithmetic(answer: str) -> bool:
    return re.fullmatch(r"[\d\s+\-*/().]*", answer) is not None and "**" not in answer


def _is_plain_list(answer: str) -> bool:
    return re.fullmatch(r"""[\w\s,\[\]'".\-]*""", answer) is not None and not re.search(r"__|\bfor\b", answer)


def _is_plain_formula(answer: str) -> bool:
    if (
        len(answer) > 1000
        or not re.fullmatch(r"[A-Za-z\d\s+\-*/(),.]*", answer)
        or re.search(r"\d{10}", answer)
    ):
        return False
    names = re.findall(r"[A-Za-z]+", answer)
    if not all(len(name) == 1 or name in _FUNCTIONS for name in names) or re.search(r"\.\s*[A-Za-z]", answer):
        return False
    power = r"\*\*\s*(?:\d{1,3}|[A-Za-z]|\(\s*-?\s*\d{1,3}(?:\s*/\s*\d{1,3})?\s*\))(?![\dA-Za-z(])(?!\s*\*\*)"
    return len(re.findall(power, answer)) == answer.count("**") and len(re.findall(r"\)\s*\*\*", answer)) <= 2


_FUNCTIONS = frozenset(
    (
        *("Integral", "pi", "sqrt", "exp", "log", "ln", "sin", "cos", "tan"),
        *("asin", "acos", "atan", "sinh", "cosh", "tanh"),
    )
)
_PLAIN_ANSWERS = {
    "countdown": _is_plain_arithmetic,
    "puzzle24": _is_plain_arithmetic,
    "binary_matrix": _is_plain_list,
    "n_queens": _is_plain_list,
    "spiral_matrix": _is_plain_list,
    "string_insertion": _is_plain_list,
    "intermediate_integration": _is_plain_formula,
    "polynomial_multiplication": _is_plain_formula,
    "simple_integration": _is_plain_formula,
}


def _check_options(task: str, options: dict[str, Any], known: Iterable[str]) -> None:
    for option in options:
        if option not in known:
            raise ConfigError(f"task {task!r} has no option {option!r}{did_you_mean(option, known)}")


def _bad_option(task: str, error: Exception) -> ConfigError:
    what = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"task {task!r} does not take these options: {what}")
