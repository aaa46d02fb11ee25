"""Every objective, and the losses of peers that are installed, put to the contract clause by clause."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.record import RESULTS, device_name, write_record
from gold.losses import OBJECTIVES, SUPPORTS, Objective
from tests.contract import source
from tests.contract.clauses import CLAUSES, variants

PAGE = Path(__file__).resolve().parents[1] / "docs" / "contract.md"

LazyLogits = dict[str, dict[str, str]]
FLOORS_OF = (
    *(
        f"{name}/{support}"
        for name in ("reverse_kl", "forward_kl", "jsd")
        for support in ("bytes", "prefix", "shared")
    ),
    *("span_pg", "token_pg", "gold", "alm", "x_token"),
)


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, keeps the record, writes docs/contract.md; 1 if an objective of ours breaks a clause."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks contract", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="the losses of installed peers too")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    ours = measure(variants())
    kept = _kept()
    theirs, versions = kept.get("peers", {}), kept.get("peer_versions", {})
    if given.peers:
        if peers.installed():
            theirs, versions = measure(peers.losses()), peers.installed()
        else:
            print("no peer is installed here, what was measured before is kept; see benchmarks/peers.py")
    data = {
        "clauses": {c.number: c.says for c in CLAUSES},
        "ours": ours,
        "peers": theirs,
        "peer_versions": versions,
    }
    data["floors"] = floors()
    text = page(data)
    print(text)
    if not given.dry:
        seconds = time.perf_counter() - started
        command = "python -m benchmarks contract" + (" --peers" if given.peers else "")
        write_record("contract", data, command=command, seconds=seconds, device=device_name("cpu", 1))
        PAGE.write_text(text, encoding="utf-8")
    return int(any(cell.startswith(("**", "raises")) for row in ours.values() for cell in row.values()))


def measure(objectives: Iterable[tuple[str, Objective]]) -> LazyLogits:
    """What each clause finds of each objective: holds, an exception, broken with the measure, or – where it does not
    apply."""
    found: LazyLogits = {}
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


def floors() -> dict[str, dict[str, list[float]]]:
    """Of objectives by name, for each pair of tokenizers: the expected loss per unit and the norm of its expected
    gradient between two models that write one source of text, and the latter between models of two sources."""
    found: dict[str, dict[str, list[float]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, objective in variants():
            if name not in FLOORS_OF:
                continue
            mine, other = source.source(0, 4), source.source(50, 4)
            found[name] = {}
            for pair in source.PAIRS:
                value, norm = source.expected(objective, source.pair_of(pair), mine, mine)
                _, beside = source.expected(objective, source.pair_of(pair), mine, other)
                found[name][pair] = [value, norm, beside]
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

{_table(data["clauses"], data["peers"])}
"""
    tokenizers = "; ".join(
        f"*{name}*: student {_merges(mine)}, teacher {_merges(theirs)}"
        for name, (mine, theirs) in source.PAIRS.items()
    )
    says = "\n".join(f"- **{number}** {text}" for number, text in data["clauses"].items())
    return f"""# The contract

The properties that every objective is tested for. Each clause is a measurement with a bound, on toy models with
different tokenizers, in float64 ([clauses](../tests/contract/clauses.py)). Every row of the table of objectives is
tested. `python -m benchmarks contract` writes this page.

{says}

For sampled estimators, full enumeration of their expectation replaces clauses 1 and 7
([policy gradients](../tests/contract/test_policy.py)). "–" means that a clause does not apply.

{_table(data["clauses"], data["ours"])}

## Exceptions

Clauses that an objective cannot hold by its nature. They are declared in its row of the table, with the reason, and a
test shows each of them.

{chr(10).join(exceptions)}

## Floors

Clause 8a in numbers: the expected loss per unit if student and teacher are models of one source of text, each in its
own tokenizer's tokens, so that the true divergence is 0; and the length of the expected gradient there, as a share of
the one towards a teacher of another source. All texts of up to four letters are enumerated,
tokens that are never written have logits of {source.NEVER:g}. Such a loss cannot fall to 0, and training
that starts at the teacher moves away from it. For policy gradients only the expected gradient is meaningful. The
tokenizers: {tokenizers}.

{_floors(data["floors"])}
{theirs}"""


def _merges(merges: Sequence[str]) -> str:
    return " ".join(f"`{m.replace('+', '')}`" for m in merges) or "letters"


def _floors(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    lines = [f"| objective | {' | '.join(source.PAIRS)} |", "|---" + "|---:" * len(source.PAIRS) + "|"]
    for name, by_pair in found.items():
        gradient_only = "_pg" in name
        cells = (
            ("" if gradient_only else f"{value:.3f}, ") + f"{norm / beside:.0%}"
            for value, norm, beside in (by_pair[pair] for pair in source.PAIRS)
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(clauses: Mapping[str, str], rows: LazyLogits) -> str:
    lines = [f"| objective | {' | '.join(clauses)} |", "|---" * (len(clauses) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row[number] for number in clauses)} |" for name, row in rows.items()]
    return "\n".join(lines)


def _kept() -> dict[str, Any]:
    path = RESULTS / "contract.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["data"]) if path.is_file() else {}
