"""The MLflow store: finds and makes experiments, studies and runs, and reads RunRecords back.

A study is a parent run, a cell a child run tagged with its key. What is told of a run goes through the spool instead.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from lmu_dist.config import ConfigError, Folder, open_folder
from lmu_dist.records import COMPLETE, POSITION_LOSS, VAL_LOSS, WAITING, RunRecord

PARENT, RUN_NAME, KEY, STATUS, STUDY = "mlflow.parentRunId", "mlflow.runName", "lmu.key", "lmu.status", "lmu.study"
FOLDER, PLACE, ALIVE, CLAIM = "lmu.folder", "lmu.place", "lmu.alive_ms", "lmu.claim"
SILENCE_SECONDS = 90.0  # without a sign of life, after which a run counts as abandoned
PLAN = "plan.json"  # artifact of a study
REPORT, REPORT_ANY_CODE, STALE = "lmu.report", "lmu.report_any_code", "lmu.stale"  # of the run that keeps a report

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def default_uri(folder: Path) -> str:
    """Where runs are recorded unless MLFLOW_TRACKING_URI says otherwise: an SQLite file in `folder`."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def check_no_password(uri: str) -> None:
    """Raises ConfigError if a store's URI holds a password: it is told to people, logged and kept with every run."""
    parts = urlsplit(uri)
    if parts.password or "password=" in parts.query:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a password, which all who see the record could read; take it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: PGPASSWORD, or a password file)"
        )


class AwayError(ConfigError):
    """The store does not answer, or refuses."""


class Store:
    """An MLflow tracking store, by URI. Methods raise AwayError when it does not answer."""

    def __init__(self, uri: str) -> None:
        check_no_password(uri)
        if uri.startswith("sqlite:///"):
            # The recorder lives in another folder, where a relative path would mean another file.
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
            folder = Path(uri.removeprefix("sqlite:///")).parent
            if not os.access(folder, os.W_OK):
                raise ConfigError(f"MLflow's store {uri} cannot be written; set MLFLOW_TRACKING_URI to another")
        self.uri = uri
        with self._answering():
            self.client = MlflowClient(uri)

    def check(self) -> None:
        """Raises ConfigError if the store does not answer."""
        with self._answering():
            self.client.search_experiments(max_results=1)

    def open_study(self, experiment: str, study: str) -> tuple[str, str]:
        """(experiment id, run id) of a study, made if new."""
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage != "active":
                raise ConfigError(f"experiment {experiment!r} was deleted in MLflow; restore it there or choose another name")
            experiment_id = (
                found.experiment_id if found else self.client.create_experiment(experiment, self._artifacts(experiment))
            )
            runs = self.client.search_runs([experiment_id], f"tags.`{STUDY}` = '{study}'", max_results=1)
            run = runs[0] if runs else self.client.create_run(experiment_id, tags={STUDY: study, RUN_NAME: study})
            return experiment_id, run.info.run_id

    def find_run(self, key: str) -> Run | None:
        """The run of a cell, in whatever experiment it was first asked for; the first made, should there be two."""
        return min(self.runs_of(key), key=lambda run: (run.info.start_time, run.info.run_id), default=None)

    def runs_of(self, key: str) -> list[Run]:
        """All runs with the key of a cell; two only while drivers that share nothing but this store find that out."""
        with self._answering():
            experiments = self._experiments()
            return self._search(experiments, f"tags.`{KEY}` = '{key}'") if experiments else []

    def create_run(self, experiment_id: str, study_id: str, name: str, key: str, folder: str, place: str = "") -> str:
        """A new child run of a study, tagged with its key, its folder, and where its drivers have their locks (there, too)."""
        with self._answering():
            tags = {
                PARENT: study_id,
                RUN_NAME: name,
                KEY: key,
                STATUS: WAITING,
                FOLDER: folder,
                PLACE: place or folder,
                ALIVE: alive_now(),
            }
            return self.client.create_run(experiment_id, tags=tags).info.run_id

    def drop_run(self, run_id: str) -> None:
        """Takes back a run that was made in vain."""
        with self._answering():
            self.client.delete_run(run_id)

    def folder_of(self, run_id: str) -> Folder:
        """The folder with a run's checkpoints."""
        if self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).exists():
            raise ConfigError(f"{run_id} is no folder, and there is no {self.uri} that could know a run of that name")
        try:
            folder = self.client.get_run(run_id).data.tags.get("lmu.folder")
        except MlflowException as e:
            raise ConfigError(f"no run {run_id!r} in {self.uri}, nor a folder of that name: {one_line(e)}") from e
        if not folder or not open_folder(folder).is_dir():
            raise ConfigError(f"run {run_id} has no folder on this machine (recorded: {folder}); give the path of its folder")
        return open_folder(folder)

    def runs(self, experiment: str) -> list[Run]:
        """All cells' runs of an experiment, begun or ended."""
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                names = ", ".join(e.name for e in self.client.search_experiments(max_results=20))
                raise ConfigError(f"no experiment {experiment!r} in {self.uri}; there are: {names}")
            return self._search([found.experiment_id], f"tags.`{KEY}` LIKE '%'")

    def records(self, experiment: str) -> dict[str, RunRecord]:
        """All complete RunRecords of an experiment by run id."""
        found = {run.info.run_id: record_of(run) for run in self.runs(experiment)}
        return {run_id: record for run_id, record in found.items() if record is not None}

    def runs_by_key(self, data_digest: str, code_digest: str) -> dict[str, Run]:
        """Runs on some data by some code, in whatever experiment, by their keys; of two with one key the first made."""
        with self._answering():
            made_with = f"params.data_digest = '{data_digest}' AND params.code_digest = '{code_digest}'"
            found = self._search(self._experiments(), f"tags.`{KEY}` LIKE '%' AND {made_with}")
            return {run.data.tags[KEY]: run for run in sorted(found, key=lambda run: run.info.start_time, reverse=True)}

    def cells(self, experiment: str) -> tuple[list[Run], dict[str, Run], list[dict[str, Any]]]:
        """What belongs to an experiment: its runs, by key those that others made of cells it planned, and cells not begun."""
        own = self.runs(experiment)
        keys = {run.data.tags[KEY] for run in own}
        missing = {cell["key"]: cell for cell in self.read_plans(experiment) if cell["key"] not in keys}
        elsewhere = dict[str, Run]()
        if missing:
            with self._answering():
                others = self._search(self._experiments(), f"tags.`{KEY}` LIKE '%'")
            # Of several with one key that which is done, and else the first made: the last one written stays.
            others.sort(key=lambda run: (run.data.tags.get(STATUS) == COMPLETE, -run.info.start_time))
            elsewhere = {run.data.tags[KEY]: run for run in others if run.data.tags[KEY] in missing}
        return own, elsewhere, [cell for key, cell in missing.items() if key not in elsewhere]

    def tag(self, run_id: str, tags: dict[str, str]) -> None:
        """Sets tags at once, past the spool."""
        with self._answering():
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def tag_of(self, run_id: str, key: str) -> str | None:
        """A tag as it now is."""
        with self._answering():
            return self.client.get_run(run_id).data.tags.get(key)

    def _experiments(self) -> list[str]:
        return [e.experiment_id for e in self.client.search_experiments(ViewType.ACTIVE_ONLY)]

    def _search(self, experiment_ids: list[str], query: str) -> list[Run]:
        found, token = list[Run](), None
        while True:
            page = self.client.search_runs(experiment_ids, query, page_token=token)
            found += page
            if not (token := page.token):
                return found

    def retire_run(self, run_id: str) -> None:
        """Takes a run out of the study, to be made again: it stays in MLflow, under another tag than that of a cell."""
        with self._answering():
            run = self.client.get_run(run_id)
            self.client.set_tag(run_id, "lmu.retired_key", run.data.tags[KEY])
            self.client.set_tag(run_id, STATUS, "retired")
            self.client.delete_tag(run_id, KEY)

    def write_plan(self, experiment: str, study: str, cells: list[dict[str, Any]]) -> None:
        """Leaves with a study what it means to run, for `status`."""
        _, study_id = self.open_study(experiment, study)
        with self._answering():
            self.client.log_dict(study_id, {"cells": cells}, PLAN)

    def read_plans(self, experiment: str) -> list[dict[str, Any]]:
        """What the studies of an experiment mean to run."""
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            studies = self.client.search_runs([found.experiment_id], f"tags.`{STUDY}` LIKE '%'") if found else []
            cells = list[dict[str, Any]]()
            for study in studies:
                if any(a.path == PLAN for a in self.client.list_artifacts(study.info.run_id)):
                    with TemporaryDirectory() as folder:
                        path = self.client.download_artifacts(study.info.run_id, PLAN, folder)
                        cells += json.loads(Path(path).read_text())["cells"]
            return cells

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step each metric of a run has, for a spool that lost its file."""
        with self._answering():
            metrics = self.client.get_run(run_id).data.metrics
            return {k: max(m.step for m in self.client.get_metric_history(run_id, k)) for k in metrics}

    def validations(self, run_id: str, batch_tokens: int) -> list[tuple[int, float]]:
        """(tokens, loss in nats) of every validation of a run, in order."""
        with self._answering():
            points = {m.step: m.value for m in self.client.get_metric_history(run_id, VAL_LOSS)}
            return [((step + 1) * batch_tokens, loss) for step, loss in sorted(points.items())]

    def position_losses(self, run_id: str) -> list[float]:
        """Validation loss at position 1 .. n of a row, in nats; empty if the run has told none."""
        with self._answering():
            points = {m.step: m.value for m in self.client.get_metric_history(run_id, POSITION_LOSS)}
            return [loss for _, loss in sorted(points.items())]

    def write_report(
        self,
        experiment: str,
        digest: str,
        any_code: bool,
        files: Sequence[Path],
        params: dict[str, str],
        metrics: dict[str, float],
    ) -> tuple[str, list[str]]:
        """Keeps a report as a run of its experiment: (its id, the reports it makes stale). The same inputs are the same run.

        Raises AwayError, also if the files cannot be kept; the run is FAILED then.
        """
        known = self.reports(experiment)
        same = [run_id for run_id, old, any_old in known if (old, any_old) == (digest, any_code)]
        others = [run_id for run_id, old, any_old in known if old != digest and any_old == any_code]
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            assert found is not None
            tags = {REPORT: digest, REPORT_ANY_CODE: str(any_code), RUN_NAME: "report"}
            run_id = same[0] if same else self.client.create_run(found.experiment_id, tags=tags).info.run_id
            now = int(time.time() * 1000)
            told = [] if same else [Param(k, v) for k, v in params.items()]
            self.client.log_batch(run_id, [Metric(k, v, now, 0) for k, v in metrics.items()], told)
            try:
                for file in files:
                    self.client.log_artifact(run_id, str(file))
            except (OSError, ImportError) as e:  # of whatever store artifacts are in
                self.client.set_terminated(run_id, "FAILED")
                raise AwayError(f"MLflow at {self.uri} cannot keep files of run {run_id}: {one_line(e)}") from e
            self.client.set_tag(run_id, STALE, "false")
            self.client.set_terminated(run_id)
            for other in others:
                self.client.set_tag(other, STALE, "true")
        return run_id, others

    def reports(self, experiment: str) -> list[tuple[str, str, bool]]:
        """(run id, digest of its inputs, whether they may differ in code) of the reports of an experiment, newest first."""
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            runs = self._search([found.experiment_id], f"tags.`{REPORT}` LIKE '%'") if found else []
            return [(r.info.run_id, r.data.tags[REPORT], r.data.tags.get(REPORT_ANY_CODE) == "True") for r in runs]

    def _artifacts(self, experiment: str) -> str | None:
        """A folder beside the SQLite file; a server decides for itself."""
        if not self.uri.startswith("sqlite:////"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment).as_uri()

    def _answering(self) -> "_Answering":
        return _Answering(self.uri)


@dataclass
class _Answering:
    """Turns MLflow's errors into one line that names the store."""

    uri: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, MlflowException) and (
            error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in str(error)
        ):
            raise ConfigError(
                f"MLflow at {self.uri} refuses the user or the password; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or put them into ~/.mlflow/credentials"
            ) from error
        if isinstance(error, MlflowException | SQLAlchemyError):
            raise AwayError(
                f"MLflow at {self.uri} does not answer, or refuses; start it, or set MLFLOW_TRACKING_URI: {one_line(error)}"
            ) from error


def alive_now() -> str:
    """The sign of life of a run: milliseconds since 1970."""
    return str(int(time.time() * 1000))


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks, cut at 300 characters."""
    return " ".join(str(error).split())[:300]


def record_of(run: Run) -> RunRecord | None:
    """The RunRecord of a run that ended; None for one that has not."""
    try:
        return RunRecord.from_columns(run.data.params, run.data.metrics, run.data.tags)
    except (KeyError, ValueError):
        return None
