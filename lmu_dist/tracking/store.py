"""The MLflow store: finds and creates experiments, studies and runs, and reads RunRecords.

A study is a parent run; a cell is a child run, tagged with its key. Metrics do not go through this module but through
MetricsLog and MLflowUploader.
"""

import functools
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from lmu_dist.config import ConfigError, FailedError, Folder, open_folder
from lmu_dist.records import COMPLETE, POSITION_LOSS, VAL_LOSS, WAITING, RunRecord
from lmu_dist.storage import write_atomic
from lmu_dist.tracking import pages, sqlite_file

PARENT, RUN_NAME, KEY, STATUS, STUDY = "mlflow.parentRunId", "mlflow.runName", "lmu.key", "lmu.status", "lmu.study"
FOLDER, OWNER_ID, HEARTBEAT, CLAIM = "lmu.folder", "lmu.place", "lmu.alive_ms", "lmu.claim"
HEARTBEAT_TIMEOUT_SECONDS = 90.0  # without a heartbeat, after which a run counts as abandoned
PLAN = "plan.json"  # artifact of a study
ANSWER = "lmu.answer"  # tag of a study: the answer of its newest report
REPORT, REPORT_ANY_CODE, STALE = "lmu.report", "lmu.report_any_code", "lmu.stale"  # tags of the run that holds a report

OUTAGE_SECONDS = 3.0  # how long a store that did not answer is not asked again
RUN_FILE = "run.json"  # in the folder of a run: its id and its store

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# It logs the traceback of every error that it raises; our messages have the reason.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


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


class MLflowUnavailableError(FailedError):
    """The MLflow store does not answer, or answers with an error. `reason` is the error alone, without store and advice."""

    reason = ""


class BusyError(ConfigError):
    """Another driver is training the cell."""


@dataclass(frozen=True)
class RunIdentity:
    """What is known of a cell's MLflow run before MLflow has it: enough to find it by its key, or to create it."""

    experiment: str
    study: str
    name: str
    key: str
    folder: str
    owner_id: str  # of the drivers that share file locks with this one


class Store:
    """An MLflow tracking store, by URI. Methods raise MLflowUnavailableError when it does not answer.

    An SQLite file that does not exist is created by the first method that is called; see `existing_store`.
    """

    def __init__(self, uri: str) -> None:
        check_no_password(uri)
        self._file = sqlite_file.path_of(uri)
        # The metrics logger has another working directory, where a relative path would be another file.
        self.uri = uri if self._file is None else f"{sqlite_file.PREFIX}{self._file}"
        self._outage = (-OUTAGE_SECONDS, "")  # when the store did not answer, and why

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client. Making it may fail, and is tried again then: with a database it opens the store."""
        if self._file is not None:
            sqlite_file.migrate(self._file)
        return MlflowClient(self.uri)

    def connect(self) -> MlflowClient:
        """MLflow's client, unless it is known at once that the store does not answer."""
        with self._one_line_errors():
            return self.client

    def check(self) -> None:
        """Raises ConfigError if the store cannot be written, MLflowUnavailableError if it does not answer."""
        if self._file is not None:
            existing = next(path for path in (self._file, *self._file.parents) if path.exists())
            if not os.access(existing, os.W_OK):
                raise ConfigError(f"MLflow's store {self.uri} is not writable; set MLFLOW_TRACKING_URI to another store")
        with self._one_line_errors():
            self.client.search_experiments(max_results=1)

    def check_exists(self) -> None:
        """Raises ConfigError if this is an SQLite file that does not exist: MLflow would create an empty one."""
        if self._file is not None and not (self._file.exists() and self._file.stat().st_size):
            raise ConfigError(
                f"there is no MLflow store in {self._file.parent} (looked for {self._file.name}); run this in the folder of "
                "the study, or set MLFLOW_TRACKING_URI"
            )

    def open_study(self, experiment: str, study: str) -> tuple[str, str]:
        """(experiment id, run id) of a study, created if there is none."""
        with self._one_line_errors():
            found = self.client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage != "active":
                raise ConfigError(f"experiment {experiment!r} was deleted in MLflow; restore it there or choose another name")
            if found is not None:
                experiment_id = found.experiment_id
            else:
                experiment_id = self.client.create_experiment(experiment, self._artifacts(experiment))
                self._set_experiment_tags(experiment_id)
            runs = self.client.search_runs([experiment_id], f"tags.`{STUDY}` = '{study}'", max_results=1)
            run = runs[0] if runs else self.client.create_run(experiment_id, tags={STUDY: study, RUN_NAME: study})
            return experiment_id, run.info.run_id

    def find_or_create_run(self, identity: RunIdentity) -> str:
        """The id of a cell's run, created under its study if there is none. Raises BusyError if the run has another owner."""
        run = self.find_run(identity.key)
        if run is None:
            return self.create_run_of(identity)
        if owner_id_of(run) not in (None, identity.owner_id):
            raise BusyError(f"MLflow has a run of {identity.name} from {owner_id_of(run)}; metrics of two runs do not mix")
        return run.info.run_id

    def create_run_of(self, identity: RunIdentity) -> str:
        """Creates the run of a cell under its study. Raises BusyError if another driver does so at the same moment."""
        experiment_id, study_id = self.open_study(identity.experiment, identity.study)
        run_id = self.create_run(experiment_id, study_id, identity.name, identity.key, identity.folder, identity.owner_id)
        # Two drivers may create a run at the same moment. One that sees the other's run deletes its own; at least one does.
        if len(self.runs_with_key(identity.key)) > 1:
            self.delete_run(run_id)
            raise BusyError(f"{identity.name} was started by another driver at the same moment; wait for it")
        return run_id

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

    def folder_of(self, reference: str) -> Folder:
        """The folder of a run, with its checkpoints, by what tables print of the run: its name, its key or the start of it, or
        its id in MLflow. Raises ConfigError if there is no such run, if there are several, or if the folder does not exist.
        """
        found = self._runs_called(reference)
        if not found:
            raise ConfigError(
                f"there is no folder {reference!r}, and no run with this name, key or id in {self.uri}; `lmu-dist status "
                "EXPERIMENT` prints the names"
            )
        if len(found) > 1:
            some = ", ".join(f"{run.data.tags[RUN_NAME]} ({run.info.run_id})" for run in found[:5])
            more = f", and {len(found) - 5} more" if len(found) > 5 else ""
            raise ConfigError(f"{reference!r} names {len(found)} runs or starts their keys; give one of: {some}{more}")
        folder = found[0].data.tags[FOLDER]
        if not open_folder(folder).is_dir():
            raise ConfigError(f"the folder of {reference}, {folder}, is not on this machine; give the path that it has here")
        return open_folder(folder)

    def _runs_called(self, reference: str) -> list[Run]:
        """The runs of cells with this id, name or start of a key: those that fit best, in this order. One for each key."""
        if not re.fullmatch(r"[\w.-]+", reference):
            return []  # of no run, and not to be quoted in a query
        with self._one_line_errors():
            if not (experiments := self._experiments()):
                return []
            for query in (
                f"attributes.run_id = '{reference}'",
                f"tags.`{RUN_NAME}` = '{reference}' AND tags.`{KEY}` LIKE '%'",
                f"tags.`{KEY}` LIKE '{reference}%'" if re.fullmatch("[0-9a-f]{4,64}", reference) else "",
                f"tags.`{RUN_NAME}` = '{reference}'",  # of a run that was trained again since
            ):
                runs = [run for run in (self._search(experiments, query) if query else []) if FOLDER in run.data.tags]
                if runs:
                    # The first created of several with one key, as `find_run` does.
                    runs.sort(key=lambda run: run.info.start_time, reverse=True)
                    return list({run.data.tags.get(KEY, run.info.run_id): run for run in runs}.values())
        return []

    def runs(self, experiment: str) -> list[Run]:
        """The runs of all cells of an experiment. Raises ConfigError if there is no such experiment."""
        with self._one_line_errors():
            return self._search([self._experiment(experiment).experiment_id], f"tags.`{KEY}` LIKE '%'")

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
        found, token = list[Experiment](), None
        while True:  # MLflow returns at most a thousand at a time
            page = self.client.search_experiments(ViewType.ACTIVE_ONLY, page_token=token)
            found += page
            if not (token := page.token):
                return [experiment.experiment_id for experiment in found]

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
            self.client.update_run(study_id, status="RUNNING")

    def end_study(self, experiment: str, study: str, status: str = "FINISHED") -> None:
        """Ends the parent run of a study with a status of MLflow, a table of its cells as description, and its numbers."""
        experiment_id, study_id = self.open_study(experiment, study)
        self._describe(experiment, study_id)
        with self._one_line_errors():
            self._set_experiment_tags(experiment_id)
            self.client.set_terminated(study_id, status)

    def _describe(self, experiment: str, study_id: str) -> None:
        own, elsewhere, planned = self.cells(experiment)
        cells = [run for run in own if run.data.tags.get(PARENT) == study_id] + list(elsewhere.values())
        with self._one_line_errors():
            run = self.client.get_run(study_id)
            tags = run.data.tags
            note, numbers = pages.describe_study(tags[STUDY], cells, len(planned), tags.get(ANSWER, ""))
            now = int(time.time() * 1000)
            changed = [Metric(k, v, now, 0) for k, v in numbers.items() if run.data.metrics.get(k) != v]
            self.client.log_batch(study_id, changed, tags=[RunTag(pages.NOTE, note)])

    def _set_experiment_tags(self, experiment_id: str, answer: str = "") -> None:
        """Sets the description and the view of an experiment, but replaces no description that somebody else wrote."""
        existing = self.client.get_experiment(experiment_id).tags
        families = {run.data.params.get("family", "") for run in self._search([experiment_id], f"tags.`{KEY}` LIKE '%'")}
        for key, value in pages.experiment_tags(experiment_id, families - {""}, answer).items():
            ours = pages.OURS in existing.get(key, "") and answer
            if key not in existing or (key == pages.VIEW_TAG and existing[key] != value) or (key == pages.NOTE and ours):
                self.client.set_experiment_tag(experiment_id, key, value)

    def prepare_pages(self, experiment: str) -> str:
        """Saves the view that the link to an experiment names. Returns its id. Raises ConfigError if it does not exist."""
        with self._one_line_errors():
            experiment_id = self._experiment(experiment).experiment_id
            self._set_experiment_tags(experiment_id)
            return experiment_id

    @property
    def is_server(self) -> bool:
        """Whether the store has a server, with pages of its own."""
        return self.uri.startswith(("http://", "https://"))

    def artifact_root(self) -> str:
        """The folder in which a server of this SQLite file keeps the artifacts of new experiments."""
        return (self._file.parent if self._file else Path.cwd()).joinpath("mlartifacts").as_uri()

    def _experiment(self, experiment: str) -> Experiment:
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            names = ", ".join(e.name for e in self.client.search_experiments(max_results=20))
            raise ConfigError(f"no experiment {experiment!r} in {self.uri}; it has: {names}")
        return found

    def read_plans(self, experiment: str) -> list[dict[str, Any]]:
        """The cells that the studies of an experiment plan to run."""
        with self._one_line_errors():
            found = self.client.get_experiment_by_name(experiment)
            studies = self._search([found.experiment_id], f"tags.`{STUDY}` LIKE '%'") if found else []
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
        answer: str = "",
    ) -> tuple[str, list[str]]:
        """Saves a report as a run of its experiment. Returns its run id and the ids of older reports, which are marked stale.

        The studies of the experiment get the answer, one sentence, and the files too. A report of the same inputs replaces the
        files of the same run. Raises MLflowUnavailableError, also if MLflow cannot store the files; the run is FAILED then.
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
            studies = [s.info.run_id for s in self._search([found.experiment_id], f"tags.`{STUDY}` LIKE '%'")]
            try:
                for file in files:
                    self.client.log_artifact(run_id, str(file))
                    for study_id in studies:
                        self.client.log_artifact(study_id, str(file), "report")
            except (OSError, ImportError) as e:  # from the client of the artifact store
                self.client.set_terminated(run_id, "FAILED")
                raise MLflowUnavailableError(
                    f"MLflow at {self.uri} cannot store the files of run {run_id}: {one_line(e)}"
                ) from e
            self.client.set_tag(run_id, STALE, "false")
            self.client.set_tag(run_id, pages.NOTE, answer)
            self.client.set_terminated(run_id)
            for other in others:
                self.client.set_tag(other, STALE, "true")
            self._set_experiment_tags(found.experiment_id, answer)
            for study_id in studies:
                self.client.set_tag(study_id, ANSWER, answer)
        for study_id in studies:
            self._describe(experiment, study_id)
        return run_id, others

    def reports(self, experiment: str) -> list[tuple[str, str, bool]]:
        """(run id, digest of its inputs, whether these may differ in code) of the reports of an experiment, newest first."""
        with self._one_line_errors():
            found = self.client.get_experiment_by_name(experiment)
            runs = self._search([found.experiment_id], f"tags.`{REPORT}` LIKE '%'") if found else []
            return [(r.info.run_id, r.data.tags[REPORT], r.data.tags.get(REPORT_ANY_CODE) == "True") for r in runs]

    def _artifacts(self, experiment: str) -> str | None:
        """The artifact folder of a new experiment, next to the SQLite file; None for a server, which has its own default."""
        return None if self._file is None else (self._file.parent / "mlartifacts" / experiment).as_uri()

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turns MLflow's errors into a ConfigError or MLflowUnavailableError of one line that names the store.

        A store that did not answer a moment ago is not asked again: the caller would wait for each of many requests.
        """
        since, reason = self._outage
        if time.monotonic() - since < OUTAGE_SECONDS:
            raise self._unavailable(reason)
        try:
            if self._file is not None:
                sqlite_file.revision_of(self._file)  # MLflow would wait twenty seconds for a locked file, and longer at first
            yield
        except (MlflowException, SQLAlchemyError, sqlite3.Error) as e:
            code = e.error_code if isinstance(e, MlflowException) else ""
            if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in str(e):
                raise ConfigError(
                    f"MLflow at {self.uri} refuses the user or the password; set MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD, or put them into ~/.mlflow/credentials"
                ) from e
            if code in ("", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):  # any other code is an answer
                self._outage = time.monotonic(), one_line(e)
            raise self._unavailable(one_line(e)) from e

    def _unavailable(self, reason: str) -> MLflowUnavailableError:
        advice = "start it, or set MLFLOW_TRACKING_URI" if self._file is None else "wait, or set MLFLOW_TRACKING_URI"
        error = MLflowUnavailableError(f"MLflow at {self.uri} does not answer or fails; {advice}: {reason}")
        error.reason = reason
        return error


def existing_store(uri: str) -> Store:
    """The store at a URI, for commands that only read it. Raises ConfigError if it is an SQLite file that does not exist."""
    store = Store(uri)
    store.check_exists()
    return store


def save_run_id(folder: Folder, uri: str, run_id: str) -> None:
    """Saves the id of a run in its folder, so that the run can go on while MLflow is unavailable."""
    write_atomic(folder / RUN_FILE, json.dumps({"tracking_uri": uri, "run_id": run_id}).encode())


def saved_run_id(folder: Folder, uri: str) -> str | None:
    """The id of a run in a store, saved by an earlier start; None if there is none."""
    try:
        saved = json.loads((folder / RUN_FILE).read_text())
        return saved["run_id"] if saved["tracking_uri"] == uri else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def owner_id_of(run: Run) -> str | None:
    """The owner id of a run; in runs of earlier versions its folder."""
    return run.data.tags.get(OWNER_ID, run.data.tags.get(FOLDER))


def heartbeat_now() -> str:
    """The value of a heartbeat: milliseconds since 1970."""
    return str(int(time.time() * 1000))


def one_line(error: BaseException) -> str:
    """The message of an error in one line, at most 300 characters. Of a database's or a connection's error only the reason."""
    if isinstance(error, MLflowUnavailableError) and error.reason:
        return error.reason
    text = " ".join(str(error).split())
    text = re.split(r" ?\[SQL: | ?\(Background on this error at: ", text)[0]
    text = re.sub(r"^.*\(Caused by .*: ([^:]+?)[\"')]*$", r"\1", text)
    return re.sub(r"^\((\w+\.)*\w+Error\) ", "", text)[:300]


def record_of(run: Run) -> RunRecord | None:
    """The RunRecord of a run; None if the run has not ended."""
    try:
        return RunRecord.from_columns(run.data.params, run.data.metrics, run.data.tags)
    except (KeyError, ValueError):
        return None
