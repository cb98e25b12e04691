"""The MLflow store: finds and creates experiments, studies and runs, and reads RunRecords.

A study is a parent run; a cell is a child run, tagged with its key. Metrics do not go through this module but through
MetricsLog and MLflowUploader.
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
FOLDER, OWNER_ID, HEARTBEAT, CLAIM = "lmu.folder", "lmu.place", "lmu.alive_ms", "lmu.claim"
HEARTBEAT_TIMEOUT_SECONDS = 90.0  # without a heartbeat, after which a run counts as abandoned
PLAN = "plan.json"  # artifact of a study
REPORT, REPORT_ANY_CODE, STALE = "lmu.report", "lmu.report_any_code", "lmu.stale"  # tags of the run that holds a report

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def default_uri(folder: Path) -> str:
    """The URI of the default store, an SQLite file in `folder`, for when MLFLOW_TRACKING_URI is not set."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def check_no_password(uri: str) -> None:
    """Raises ConfigError if a store's URI holds a password: the URI is printed, logged and saved with every run."""
    parts = urlsplit(uri)
    if parts.password or "password=" in parts.query:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a password, and everybody who can see a run could read it; remove it and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: PGPASSWORD, or a password file)"
        )


class MLflowUnavailableError(ConfigError):
    """The MLflow store does not answer, or answers with an error."""


class Store:
    """An MLflow tracking store, by URI. Methods raise MLflowUnavailableError when it does not answer."""

    def __init__(self, uri: str) -> None:
        check_no_password(uri)
        if uri.startswith("sqlite:///"):
            # The metrics logger has another working directory, where a relative path would be another file.
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
            folder = Path(uri.removeprefix("sqlite:///")).parent
            if not os.access(folder, os.W_OK):
                raise ConfigError(f"MLflow's store {uri} is not writable; set MLFLOW_TRACKING_URI to another store")
        self.uri = uri
        with self._one_line_errors():
            self.client = MlflowClient(uri)

    def check(self) -> None:
        """Raises ConfigError if the store does not answer."""
        with self._one_line_errors():
            self.client.search_experiments(max_results=1)

    def open_study(self, experiment: str, study: str) -> tuple[str, str]:
        """(experiment id, run id) of a study, created if there is none."""
        with self._one_line_errors():
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
        """The run of a cell, in any experiment; None if there is none. Of two runs, the one created first."""
        return min(self.runs_with_key(key), key=lambda run: (run.info.start_time, run.info.run_id), default=None)

    def runs_with_key(self, key: str) -> list[Run]:
        """All runs with the key of a cell. There are two only for a moment, when two drivers create the same run."""
        with self._one_line_errors():
            experiments = self._experiments()
            return self._search(experiments, f"tags.`{KEY}` = '{key}'") if experiments else []

    def create_run(self, experiment_id: str, study_id: str, name: str, key: str, folder: str, owner_id: str = "") -> str:
        """Creates a run of a cell under its study and returns its id. The default owner id is the folder."""
        with self._one_line_errors():
            tags = {
                PARENT: study_id,
                RUN_NAME: name,
                KEY: key,
                STATUS: WAITING,
                FOLDER: folder,
                OWNER_ID: owner_id or folder,
                HEARTBEAT: heartbeat_now(),
            }
            return self.client.create_run(experiment_id, tags=tags).info.run_id

    def delete_run(self, run_id: str) -> None:
        """Deletes a run that lost a race with another driver."""
        with self._one_line_errors():
            self.client.delete_run(run_id)

    def folder_of(self, run_id: str) -> Folder:
        """The folder of a run, with its checkpoints. Raises ConfigError if the run, or its folder, does not exist."""
        if self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).exists():
            raise ConfigError(f"{run_id} is not a folder, and the MLflow store {self.uri} does not exist")
        try:
            folder = self.client.get_run(run_id).data.tags.get("lmu.folder")
        except MlflowException as e:
            raise ConfigError(f"there is no folder {run_id!r} and no such run in {self.uri}: {one_line(e)}") from e
        if not folder or not open_folder(folder).is_dir():
            raise ConfigError(
                f"the folder of run {run_id}, {folder}, is not on this machine; give the path of its folder instead"
            )
        return open_folder(folder)

    def runs(self, experiment: str) -> list[Run]:
        """The runs of all cells of an experiment. Raises ConfigError if there is no such experiment."""
        with self._one_line_errors():
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                names = ", ".join(e.name for e in self.client.search_experiments(max_results=20))
                raise ConfigError(f"no experiment {experiment!r} in {self.uri}; it has: {names}")
            return self._search([found.experiment_id], f"tags.`{KEY}` LIKE '%'")

    def records(self, experiment: str) -> dict[str, RunRecord]:
        """The RunRecords of the runs of an experiment that have one, by run id."""
        found = {run.info.run_id: record_of(run) for run in self.runs(experiment)}
        return {run_id: record for run_id, record in found.items() if record is not None}

    def runs_by_key(self, data_digest: str, train_version: int) -> dict[str, Run]:
        """The runs of a corpus and a training version, in any experiment, by key; of two with one key, the first created."""
        with self._one_line_errors():
            made_with = f"params.data_digest = '{data_digest}' AND params.train_version = '{train_version}'"
            found = self._search(self._experiments(), f"tags.`{KEY}` LIKE '%' AND {made_with}")
            return {run.data.tags[KEY]: run for run in sorted(found, key=lambda run: run.info.start_time, reverse=True)}

    def cells(self, experiment: str) -> tuple[list[Run], dict[str, Run], list[dict[str, Any]]]:
        """(runs of an experiment; runs of its planned cells in other experiments, by key; planned cells without a run)."""
        own = self.runs(experiment)
        keys = {run.data.tags[KEY] for run in own}
        missing = {cell["key"]: cell for cell in self.read_plans(experiment) if cell["key"] not in keys}
        elsewhere = dict[str, Run]()
        if missing:
            with self._one_line_errors():
                others = self._search(self._experiments(), f"tags.`{KEY}` LIKE '%'")
            # Of several runs with one key keep a complete one, else the first created: the last in this order replaces others.
            others.sort(key=lambda run: (run.data.tags.get(STATUS) == COMPLETE, -run.info.start_time))
            elsewhere = {run.data.tags[KEY]: run for run in others if run.data.tags[KEY] in missing}
        return own, elsewhere, [cell for key, cell in missing.items() if key not in elsewhere]

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Sets tags immediately, without the metrics log."""
        with self._one_line_errors():
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def get_tag(self, run_id: str, key: str) -> str | None:
        """The current value of a tag; None if it is not set."""
        with self._one_line_errors():
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
        """Moves the key of a run to the tag lmu.retired_key, so that its cell can be trained again. The run stays in MLflow."""
        with self._one_line_errors():
            run = self.client.get_run(run_id)
            self.client.set_tag(run_id, "lmu.retired_key", run.data.tags[KEY])
            self.client.set_tag(run_id, STATUS, "retired")
            self.client.delete_tag(run_id, KEY)

    def write_plan(self, experiment: str, study: str, cells: list[dict[str, Any]]) -> None:
        """Saves the cells that a study plans to run as an artifact of the study, for `lmu-dist status`."""
        _, study_id = self.open_study(experiment, study)
        with self._one_line_errors():
            self.client.log_dict(study_id, {"cells": cells}, PLAN)

    def read_plans(self, experiment: str) -> list[dict[str, Any]]:
        """The cells that the studies of an experiment plan to run."""
        with self._one_line_errors():
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
        """The last step of each metric of a run in MLflow, for a machine that lacks its metrics log."""
        with self._one_line_errors():
            metrics = self.client.get_run(run_id).data.metrics
            return {k: max(m.step for m in self.client.get_metric_history(run_id, k)) for k in metrics}

    def validation_losses(self, run_id: str, batch_tokens: int) -> list[tuple[int, float]]:
        """(tokens, loss in nats) of every validation of a run, in order."""
        with self._one_line_errors():
            points = {m.step: m.value for m in self.client.get_metric_history(run_id, VAL_LOSS)}
            return [((step + 1) * batch_tokens, loss) for step, loss in sorted(points.items())]

    def position_losses(self, run_id: str) -> list[float]:
        """Validation loss at position 1 .. n of a row, in nats; empty if the run has none in MLflow."""
        with self._one_line_errors():
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
        """Saves a report as a run of its experiment. Returns its run id and the ids of older reports, which are marked stale.

        A report of the same inputs replaces the files of the same run. Raises MLflowUnavailableError, also if MLflow cannot
        store the files; the run is FAILED then.
        """
        known = self.reports(experiment)
        same = [run_id for run_id, old, any_old in known if (old, any_old) == (digest, any_code)]
        others = [run_id for run_id, old, any_old in known if old != digest and any_old == any_code]
        with self._one_line_errors():
            found = self.client.get_experiment_by_name(experiment)
            assert found is not None
            tags = {REPORT: digest, REPORT_ANY_CODE: str(any_code), RUN_NAME: "report"}
            run_id = same[0] if same else self.client.create_run(found.experiment_id, tags=tags).info.run_id
            now = int(time.time() * 1000)
            new_params = [] if same else [Param(k, v) for k, v in params.items()]
            self.client.log_batch(run_id, [Metric(k, v, now, 0) for k, v in metrics.items()], new_params)
            try:
                for file in files:
                    self.client.log_artifact(run_id, str(file))
            except (OSError, ImportError) as e:  # from the client of the artifact store
                self.client.set_terminated(run_id, "FAILED")
                raise MLflowUnavailableError(
                    f"MLflow at {self.uri} cannot store the files of run {run_id}: {one_line(e)}"
                ) from e
            self.client.set_tag(run_id, STALE, "false")
            self.client.set_terminated(run_id)
            for other in others:
                self.client.set_tag(other, STALE, "true")
        return run_id, others

    def reports(self, experiment: str) -> list[tuple[str, str, bool]]:
        """(run id, digest of its inputs, whether these may differ in code) of the reports of an experiment, newest first."""
        with self._one_line_errors():
            found = self.client.get_experiment_by_name(experiment)
            runs = self._search([found.experiment_id], f"tags.`{REPORT}` LIKE '%'") if found else []
            return [(r.info.run_id, r.data.tags[REPORT], r.data.tags.get(REPORT_ANY_CODE) == "True") for r in runs]

    def _artifacts(self, experiment: str) -> str | None:
        """The artifact folder of a new experiment, next to the SQLite file; None for a server, which has its own default."""
        if not self.uri.startswith("sqlite:////"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment).as_uri()

    def _one_line_errors(self) -> "_OneLineErrors":
        return _OneLineErrors(self.uri)


@dataclass
class _OneLineErrors:
    """A context that turns MLflow's errors into a ConfigError of one line that names the store."""

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
            raise MLflowUnavailableError(
                f"MLflow at {self.uri} does not answer or fails; start it, or set MLFLOW_TRACKING_URI: {one_line(error)}"
            ) from error


def heartbeat_now() -> str:
    """The value of a heartbeat: milliseconds since 1970."""
    return str(int(time.time() * 1000))


def one_line(error: BaseException) -> str:
    """The message of an error in one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def record_of(run: Run) -> RunRecord | None:
    """The RunRecord of a run; None if the run has not ended."""
    try:
        return RunRecord.from_columns(run.data.params, run.data.metrics, run.data.tags)
    except (KeyError, ValueError):
        return None
