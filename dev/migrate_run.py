"""Give a run folder of an earlier version the names of this one, so that it can be resumed:

    python dev/migrate_run.py FOLDER

Renames the keys in config.yaml and the metrics in metrics.jsonl. Each file is replaced whole or not at all, and its old
content stays as FILE.before-migration. A folder that has the names of this version is left as it is.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gold.config import Config
from gold.errors import GoldError
from gold.files import replace_text
from gold.schema import RENAMED
from gold.train.recipe import Recipe
from gold.train.records import read_lines
from gold.train.run_folder import RunFolder, config_text

METRICS = {
    "wanted": "teacher_top1_prob",
    "missed": "teacher_top1_missed_share",
    "rest": "unresolved_mass",
    "residual": "teacher_unmatched_mass",
    "observed": "moved_to_sampled_mass",
    "white_space": "white_space_share",
    "unread": "skipped_sequences",
    "read_s": "align_s",
}
"""Metrics of earlier versions, and their names now."""
OPTIONS = {"rest": "unshared"}
"""Options of objectives, likewise."""


def migrate(folder: Path) -> list[str]:
    """What was renamed, a line each; nothing where all names are of this version."""
    with RunFolder.open(folder) as run:
        run.rewind(sys.maxsize)  # locks the folder; drops what a kill left of the last line
        config, told = renamed(run.config)
        if (config := complete(config)) != run.config:
            replace(folder / "config.yaml", config_text(config))
        file = folder / "metrics.jsonl"
        records = [record for _, record in read_lines(file)[0]] if file.exists() else []
        if found := sorted(METRICS.keys() & {name for record in records for name in record}):
            lines = [
                json.dumps({METRICS.get(k, k): v for k, v in r.items()}, ensure_ascii=False) for r in records
            ]
            replace(file, "\n".join(lines) + "\n")
            told += [f"{name} -> {METRICS[name]}" for name in found]
    return told


def renamed(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration with the names of this version, and each renamed key."""
    result, told = json.loads(json.dumps(config)), []
    for old, new in RENAMED.items():
        *above, name = old.split(".")
        section = result
        for part in above:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        *above, name = new.split(".")
        target = result
        for part in above:
            target = target.setdefault(part, {})
        target[name] = value
        told.append(f"{old} -> {new}")
    for term in [*result.get("objectives", []), *result.get("recipe", {}).get("objectives", [])]:
        term.update(term.pop("options", {}))
        for old in OPTIONS.keys() & term.keys():
            term[OPTIONS[old]] = term.pop(old)
            told.append(f"objectives: {old} -> {OPTIONS[old]}")
    if told and not result.get("recipe", {}).get("sampling", True):
        del result["recipe"]["sampling"]
    return result, told


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every key of this version.

    Raises:
        ConfigError: it has keys or values that this version does not know.
    """
    if "recipe" in config:  # a run made from Python
        return {**config, "recipe": Recipe.model_validate(config["recipe"]).model_dump(mode="json")}
    return Config.model_validate(config).to_dict()


def replace(file: Path, text: str) -> None:
    """Put a new text in place of a file, of which a copy stays."""
    kept = file.with_name(f"{file.name}.before-migration")
    if not kept.exists():
        shutil.copy2(file, kept)
    replace_text(file, text)


def main() -> int:
    """Exit status."""
    if len(sys.argv) != 2:
        print("usage: python dev/migrate_run.py FOLDER", file=sys.stderr)
        return 2
    try:
        told = migrate(Path(sys.argv[1]))
    except GoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(told) or "nothing to rename")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
