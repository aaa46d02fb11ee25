"""Trackers of other projects by name: TensorBoard, Weights & Biases, trackio, MLflow, each through its own client.

Each gets the configuration, every metric of the steps (`train/…`) and the evaluations (`eval/…`), and the samples of an
evaluation as a table. Where it writes and who is logged in is up to the client and its environment variables.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gold.errors import ConfigError, did_you_mean
from gold.files import read_json_object, replace_text
from gold.train.resume_rules import flattened
from gold.train.trackers import Guarded, RunInfo, Tracker

PROJECT = "gold"
"""Name of the project, unless an environment variable of the client names another."""
KEPT_IDS = "trackers.json"
"""File in the run folder with the id of the run in each client, by which a resumed run goes on there."""
_COLUMNS = ("step", "prompt", "completion", "stopped", "student minus teacher, nats per byte")


class Client(Tracker):
    """A tracker that has a client of another project do the work. ``folder`` is the run folder, if there is one."""

    package = ""
    """The package of the client."""
    install = ""
    """The package to install, where it has another name."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._samples: list[Mapping[str, Any]] = []

    @property
    def name(self) -> str | None:
        """The name of the run: that of its folder."""
        return self.folder.resolve().name if self.folder else None

    def start(self, run: RunInfo) -> None:
        """See ``Tracker``."""
        self.begin(flattened(dict(run.config)) | {f"header.{k}": v for k, v in run.header.items()}, run.done)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """See ``Tracker``. Samples are held until the evaluation's last."""
        if kind == "sample":
            self._samples.append(record)
            return
        self._flush()
        values = {
            f"{kind}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        self.metrics(values, int(record["step"]))

    def finish(self) -> None:
        """See ``Tracker``."""
        self._flush()
        self.end()

    def _flush(self) -> None:
        if self._samples:
            samples, self._samples = self._samples, []
            self.table([_row(sample) for sample in samples], int(samples[0]["step"]))

    def kept_id(self, new: str | None = None) -> str:
        """The id of the run in this client, the same at every resumption; ``new``: the one it has got."""
        file = self.folder / KEPT_IDS if self.folder else None
        ids = read_json_object(file, ConfigError) if file and file.exists() else {}
        found = new or ids.get(self.package)
        if not isinstance(found, str):
            found = secrets.token_hex(6)
        if file and ids.get(self.package) != found:
            replace_text(file, json.dumps({**ids, self.package: found}) + "\n")
        return found

    @abstractmethod
    def begin(self, config: Mapping[str, Any], done: int) -> None:
        """Starts the run, or goes on with it after step ``done``."""

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers of a step."""

    @abstractmethod
    def table(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs the samples of an evaluation, a row each, in ``_COLUMNS``."""

    @abstractmethod
    def end(self) -> None:
        """Ends the run, or its part until it is resumed."""


class TensorBoard(Client):
    """Event files in ``tensorboard/`` of the run folder, or in ``runs/`` without one."""

    package = "tensorboard"

    def begin(self, config: Mapping[str, Any], done: int) -> None:
        """See ``Client``."""
        from torch.utils.tensorboard import SummaryWriter

        where = str(self.folder / "tensorboard") if self.folder else None
        # Steps after the checkpoint that a resumed run takes again are dropped.
        self.writer: Any = SummaryWriter(where, purge_step=done + 1 if done else None)
        rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in config.items())
        self.writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", done)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See ``Client``."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        """See ``Client``."""
        head = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
        lines = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
        self.writer.add_text("samples", head + lines, step)
        self.writer.flush()

    def end(self) -> None:
        """See ``Client``."""
        self.writer.close()


class WandB(Client):
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and its other variables apply."""

    package = "wandb"

    def begin(self, config: Mapping[str, Any], done: int) -> None:
        """See ``Client``."""
        import wandb

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", self.name),
            id=os.environ.get("WANDB_RUN_ID") or self.kept_id(),
            resume="allow",
            config=dict(config),
            dir=str(self.folder) if self.folder else None,
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See ``Client``."""
        self.run.log(dict(values), step=step)

    def table(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        """See ``Client``."""
        import wandb

        self.run.log({"samples": wandb.Table(list(_COLUMNS), [list(row) for row in rows])}, step=step)

    def end(self) -> None:
        """See ``Client``."""
        self.run.finish()


class Trackio(Client):
    """trackio, a local dashboard; TRACKIO_SPACE_ID and its other variables apply."""

    package = "trackio"

    def begin(self, config: Mapping[str, Any], done: int) -> None:
        """See ``Client``."""
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run: Any = trackio.init(project=project, name=self.name, config=dict(config), resume="allow")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See ``Client``."""
        self.run.log(dict(values), step=step)

    def table(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        """See ``Client``."""
        import trackio

        self.run.log({"samples": trackio.Table(list(_COLUMNS), [list(row) for row in rows])}, step=step)

    def end(self) -> None:
        """See ``Client``."""
        self.run.finish()


class MLflow(Client):
    """MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables apply."""

    package = "mlflow"
    install = "mlflow-skinny"

    def begin(self, config: Mapping[str, Any], done: int) -> None:
        """See ``Client``."""
        import mlflow

        self.client: Any = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        # A run that is resumed has all parameters; MLflow refuses others.
        run = mlflow.start_run(run_id=self.kept_id() if done else None, run_name=self.name)
        self.kept_id(run.info.run_id)
        if not done:
            mlflow.log_params({_plain_name(key): str(value)[:6000] for key, value in config.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See ``Client``."""
        self.client.log_metrics({_plain_name(name): value for name, value in values.items()}, step=step)

    def table(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        """See ``Client``: an artifact per evaluation."""
        named = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
        self.client.log_dict({"samples": named}, f"samples/step-{step:06d}.json")

    def end(self) -> None:
        """See ``Client``."""
        self.client.end_run()


CLIENTS: dict[str, type[Client]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_clients(trackers: Sequence[Tracker | str]) -> None:
    """Checks that the named trackers are known and installed.

    Raises:
        ConfigError: one is not; the message says what to install.
    """
    for name in trackers:
        if not isinstance(name, str):
            continue
        if name not in CLIENTS:
            known = ", ".join(CLIENTS)
            raise ConfigError(
                f"trackers: there is no {name}; known are {known}{did_you_mean(name, list(CLIENTS), '')}"
            )
        client = CLIENTS[name]
        if importlib.util.find_spec(client.package) is None:
            raise ConfigError(
                f"trackers: {name} needs a package that is not installed: pip install "
                f"{client.install or client.package}; or leave it out of train.trackers"
            )


def with_clients(trackers: Sequence[Tracker | str], folder: Path | None) -> list[Tracker]:
    """The trackers, named ones as clients that may fail without ending the run."""
    return [Guarded(CLIENTS[t](folder), f"tracker {t}") if isinstance(t, str) else t for t in trackers]


def _row(sample: Mapping[str, Any]) -> list[Any]:
    chunks = sample.get("chunks") or ()
    gap = sum(chunk["student"] - chunk["teacher"] for chunk in chunks)
    size = len(str(sample["completion"]).encode("utf-8", "replace"))
    per_byte = round(gap / size, 4) if chunks and size else None
    return [sample["step"], sample["prompt"], sample["completion"], sample["stopped"], per_byte]


def _plain_name(name: str) -> str:
    """A name that MLflow takes: ``objectives[0].name`` is ``objectives.0.name``."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("[", ".").replace("]", ""))


def _cell(value: Any) -> str:
    """A value in a Markdown table."""
    text = "" if value is None else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "⏎").replace("<", "&lt;")
