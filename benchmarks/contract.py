"""Every objective, and the losses of peers that are installed, put to the contract clause by clause."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import peers
from benchmarks.record import RESULTS, device_name, write_record
from gold.losses import OBJECTIVES, SUPPORTS, Objective
from tests.contract import source
from tests.contract.clauses import CLAUSES, needs_one_vocabulary, variants

PAGE = Path(__file__).resolve().parents[1] / "docs" / "contract.md"

Cells = dict[str, dict[str, str]]
LONGEST = 3
"""Letters of the longest text that is enumerated."""
DRIFT_OF = (
    *(
        f"{name}/{support}"
        for name in ("reverse_kl", "forward_kl", "jsd")
        for support in ("bytes", "prefix", "shared")
    ),
    *("span_pg", "token_pg", "uld", "gold", "alm", "x_token"),
)
DRIFT_ON = ("other merges", "merges and letters", "byte fallback")
DRIFT_STEPS, DRIFT_RATE = 30, 1.0


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, keeps the record, writes docs/contract.md; 1 if an objective of ours breaks a clause."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks contract", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="the losses of installed peers too")
    parser.add_argument(
        "--floors", action="store_true", help="the floors alone; what the clauses found is kept"
    )
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    kept = _kept()
    ours = kept["ours"] if given.floors else measure(variants())
    theirs, versions = kept.get("peers", {}), kept.get("peer_versions", {})
    floors_of, drifts = floors(variants()), drift(variants(), DRIFT_OF)
    peer_floors, peer_drifts = kept.get("peer_floors", {}), kept.get("peer_drifts", {})
    if given.peers:
        if peers.installed():
            if not given.floors:
                theirs, versions = measure(peers.losses()), peers.installed()
            peer_floors, peer_drifts = floors(peers.losses()), drift(peers.losses(), None)
        else:
            print("no peer is installed here, what was measured before is kept; see benchmarks/peers.py")
    data = {
        "clauses": {c.number: c.says for c in CLAUSES},
        "ours": ours,
        "peers": theirs,
        "peer_versions": versions,
        "floors": floors_of,
        "peer_floors": peer_floors,
        "drift_steps": DRIFT_STEPS,
        "drift_rate": DRIFT_RATE,
        "drifts": drifts,
        "peer_drifts": peer_drifts,
        "exact": exact(),
    }
    text = page(data)
    print(text)
    if not given.dry:
        seconds = time.perf_counter() - started
        flags = [name for name in ("peers", "floors") if getattr(given, name)]
        command = " ".join(["python -m benchmarks contract", *(f"--{name}" for name in flags)])
        write_record("contract", data, command=command, seconds=seconds, device=device_name("cpu", 1))
        PAGE.write_text(text, encoding="utf-8")
    return int(any(cell.startswith(("**", "raises")) for row in ours.values() for cell in row.values()))


def measure(objectives: Iterable[tuple[str, Objective]]) -> Cells:
    """What each clause finds of each objective: holds, an exception, broken with the measure, or – where it does not
    apply."""
    found: Cells = {}
    for name, objective in objectives:
        row = {}
        for clause in CLAUSES:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    outcome = clause.measure(objective)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                row[clause.number] = f"raises {type(error).__name__}"
                continue
            if outcome is None:
                row[clause.number] = "–"
            elif outcome.holds:
                row[clause.number] = "holds"
            elif clause.number in objective.exceptions:
                row[clause.number] = "exception"
            else:
                row[clause.number] = f"**broken** ({outcome.found:.2g})"
        found[name] = row
    return found


Floors = dict[str, dict[str, list[float]]]


def floors(objectives: Iterable[tuple[str, Objective]]) -> Floors:
    """Of each objective that compares two vocabularies, for each pair of tokenizers: the expected loss per unit and the
    norm of its expected gradient between two models that write one source of text, and the latter between models of two
    sources."""
    found: Floors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, objective in objectives:
            if objective.needs == "nothing" or needs_one_vocabulary(objective):
                continue
            found[name] = {}
            for pair in source.PAIRS:
                mine, other = (source.texts_of(pair, seed, LONGEST) for seed in (0, 50))
                vocabularies = source.pair_of(pair)
                value, norm = source.expected(objective, vocabularies, mine, mine)
                _, beside = source.expected(objective, vocabularies, mine, other)
                found[name][pair] = [value, norm, beside]
    return found


def drift(
    objectives: Iterable[tuple[str, Objective]], names: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    """How far expected steps carry a student that starts at its teacher: true KL per byte afterwards, by objective and
    pair of tokenizers."""
    found: dict[str, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, objective in objectives:
            if needs_one_vocabulary(objective) or (names is not None and name not in names):
                continue
            found[name] = {
                pair: source.drift(objective, pair, DRIFT_STEPS, DRIFT_RATE, LONGEST) for pair in DRIFT_ON
            }
    return found


def exact() -> dict[str, dict[str, float]]:
    """Of the measure of evaluations, for each pair of tokenizers: its value and bound between models of one source, and
    between two sources, where ``true`` is the divergence; with all branches, and the bound without any."""
    found = {}
    for pair in source.PAIRS:
        mine, other = (source.texts_of(pair, seed, LONGEST) for seed in (0, 50))
        same, same_bound = source.exact_divergence(pair, mine, mine, 1e-9)
        value, bound = source.exact_divergence(pair, mine, other, 1e-9)
        found[pair] = {
            "same": same,
            "same_bound": same_bound,
            "true": source.true_kl(mine, other),
            "value": value,
            "bound": bound,
            "bound_without_branches": source.exact_divergence(pair, mine, other, None)[1],
        }
    return found


def page(data: Mapping[str, Any]) -> str:
    """docs/contract.md."""
    exceptions = [
        f"- `{name}`, clause {number}: {reason}."
        for name, owner in (*SUPPORTS.items(), *OBJECTIVES.items())
        for number, reason in owner.exceptions.items()
    ]
    theirs = ""
    if data["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in data["peer_versions"].items())
        theirs = f"""
## Losses of other libraries

The same clauses for the published functions of {versions} as they are called in training, one text at a
time. A number is the measured value where the clause allows less. The exceptions of `uld` and `gold` above apply to
every loss of their kind.

{_table(data["clauses"], _with_floors(data["peers"], data["peer_floors"]))}

{_floors(data["peer_floors"])}

{_drifts(data["peer_drifts"])}
"""
    tokenizers = "\n".join(
        f"| {name} | {pair.student} | {pair.teacher} |" for name, pair in source.PAIRS.items()
    )
    says = "\n".join(f"- **{number}** {text}" for number, text in data["clauses"].items())
    return f"""# The contract

The properties that every objective is tested for. Each clause is a measurement with a bound, on toy models with
different tokenizers, in float64 ([clauses](../tests/contract/clauses.py)). Every row of the table of objectives is
tested. `python -m benchmarks contract` writes this page.

{says}

For sampled estimators, full enumeration of their expectation replaces clauses 1 and 7
([policy gradients](../tests/contract/test_policy.py)). "–" means that a clause does not apply.

{_table(data["clauses"], _with_floors(data["ours"], data["floors"]))}

## Exceptions

Clauses that an objective cannot hold by its nature. They are declared in its row of the table, with the reason, and a
test shows each of them.

{chr(10).join(exceptions)}

## Floors

Clause 8a in numbers: the expected loss per unit if student and teacher are models of one source of text, each in its
own tokenizer's tokens, so that the true divergence is 0; and the length of the expected gradient there, as a share of
the one towards a teacher of another source. All texts of up to {LONGEST} letters are enumerated, over the
{len(source.PAIRS)} pairs of tokenizers below; tokens that are never written have logits of {source.NEVER:g}. Such a
loss cannot fall to 0, and training that starts at the teacher moves away from it. The column 8a above has the largest
floor over the pairs, of policy gradients, of which only the gradient is meaningful, its share; the record
(benchmarks/results/contract.json) has all of them.

{_floors(data["floors"])}

How far {data["drift_steps"]} expected steps on policy (gradient descent, rate {data["drift_rate"]:g}) carry a student
that starts at its teacher: true KL of its texts from the teacher's afterwards, in nats per byte.

{_drifts(data["drifts"])}

What evaluations measure instead, `exact_reverse_kl_per_byte` and its lower bound
([method.md](method.md#11-measures)), between the same models and between those of two sources. With all branches the
value is the true divergence within 1e-6; the bound is 0 between models of one source, never above the divergence, and
rises with every branch ([tests](../tests/contract/test_exact.py)).

{_exact(data["exact"])}

The tokenizers, by the merges of their tokens:

| pair | student | teacher |
|---|---|---|
{tokenizers}
{theirs}"""


def _floors(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    lines = [
        "| objective | least | median | largest | where | gradient, least | median | largest |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for name, by_pair in found.items():
        values = [value for value, _, _ in by_pair.values()]
        shares = [norm / beside for _, norm, beside in by_pair.values()]
        cells = [f"{x:.0%}" for x in (min(shares), median(shares), max(shares))]
        if "_pg" in name:
            where = max(by_pair, key=lambda pair: by_pair[pair][1] / by_pair[pair][2])
            lines.append(f"| {name} | – | – | – | {where} | {' | '.join(cells)} |")
            continue
        where = max(by_pair, key=lambda pair: by_pair[pair][0])
        sizes = " | ".join(_number(x) for x in (min(values), median(values), max(values)))
        lines.append(f"| {name} | {sizes} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:.3f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _with_floors(rows: Cells, floors_of: Floors) -> Cells:
    """The rows with the largest floor of each objective in place of what clause 8a says of one pair."""
    found = {}
    for name, row in rows.items():
        cell = row["8a"]
        if by_pair := floors_of.get(name):
            share = max(norm / beside for _, norm, beside in by_pair.values())
            value = max(value for value, _, _ in by_pair.values())
            cell = f"{share:.0%}" if "_pg" in name else _number(value)
        found[name] = row | {"8a": cell}
    return found


def _drifts(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"| objective | {' | '.join(DRIFT_ON)} |", "|---" + "|---:" * len(DRIFT_ON) + "|"]
    lines += [
        f"| {name} | {' | '.join(_number(by_pair[pair]) for pair in DRIFT_ON)} |"
        for name, by_pair in found.items()
    ]
    return "\n".join(lines)


def _exact(found: Mapping[str, Mapping[str, float]]) -> str:
    names = {
        "same": "one source: value",
        "same_bound": "bound",
        "true": "two sources: true KL",
        "value": "value",
        "bound_without_branches": "bound without branches",
    }
    lines = [f"| pair | {' | '.join(names.values())} |", "|---" + "|---:" * len(names) + "|"]
    for pair, row in found.items():
        cells = (f"{row[name]:.1e}" if name.startswith("same") else f"{row[name]:.6f}" for name in names)
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(clauses: Mapping[str, str], rows: Cells) -> str:
    lines = [f"| objective | {' | '.join(clauses)} |", "|---" * (len(clauses) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row[number] for number in clauses)} |" for name, row in rows.items()]
    return "\n".join(lines)


def _kept() -> dict[str, Any]:
    path = RESULTS / "contract.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["data"]) if path.is_file() else {}
