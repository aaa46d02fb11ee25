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
from tests.contract.clauses import CLAUSES, variants

PAGE = Path(__file__).resolve().parents[1] / "docs" / "contract.md"

Rows = dict[str, dict[str, str]]


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
        if not peers.installed():
            print("no peer is installed here; see benchmarks/peers.py")
        theirs, versions = measure(peers.losses()), peers.installed()
    data = {
        "clauses": {c.number: c.says for c in CLAUSES},
        "ours": ours,
        "peers": theirs,
        "peer_versions": versions,
    }
    text = page(data)
    print(text)
    if not given.dry:
        seconds = time.perf_counter() - started
        command = "python -m benchmarks contract" + (" --peers" if given.peers else "")
        write_record("contract", data, command=command, seconds=seconds, device=device_name("cpu", 1))
        PAGE.write_text(text, encoding="utf-8")
    return int(any(cell.startswith(("**", "raises")) for row in ours.values() for cell in row.values()))


def measure(objectives: Iterable[tuple[str, Objective]]) -> Rows:
    """What each clause finds of each objective: holds, an exception, broken with the measure, or – where it does not
    apply."""
    found: Rows = {}
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
## Losses of peers

The same clauses, put to the published functions of {versions} as they are called in training,
one text at a time. A number is what was measured where the clause allows less. What `uld` and `gold` are excused from
above, no loss of their kind can hold.

{_table(data["clauses"], data["peers"])}
"""
    says = "\n".join(f"- **{number}** {text}" for number, text in data["clauses"].items())
    return f"""# The contract

What every objective is held to. Each clause is a measurement with a bound, on toy models whose tokenizers really
disagree, in float64 ([clauses](../tests/contract/clauses.py)); an objective is under contract by being in the table.
`python -m benchmarks contract` writes this page.

{says}

A sampled estimator's expectation is held by full enumeration instead of clauses 1 and 7
([policy gradients](../tests/contract/test_policy.py)).

{_table(data["clauses"], data["ours"])}

## Exceptions

What an objective cannot hold by its nature is declared beside it, with the reason, and a test shows that it is so.

{chr(10).join(exceptions)}
{theirs}"""


def _table(clauses: Mapping[str, str], rows: Rows) -> str:
    lines = [f"| objective | {' | '.join(clauses)} |", "|---" * (len(clauses) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row[number] for number in clauses)} |" for name, row in rows.items()]
    return "\n".join(lines)


def _kept() -> dict[str, Any]:
    path = RESULTS / "contract.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["data"]) if path.is_file() else {}
