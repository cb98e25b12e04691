"""The connection to an MLflow store: a URI in, a Store out, or an error of one line. Called by all that read or write MLflow.

What a store holds has a module for each: experiments, studies, runs (of cells), reports.
"""

import gc
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from mlflow.entities import Experiment, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from lmu_dist.config import ConfigError
from lmu_dist.tracking import address, sqlite_file
from lmu_dist.tracking.errors import MLflowUnavailableError, one_line
from lmu_dist.tracking.tags import KEY

# How long a store that did not answer is not asked again: three times as long as the caller has waited for it.
MIN_OUTAGE_SECONDS, MAX_OUTAGE_SECONDS = 3.0, 60.0
CELLS = f"tags.`{KEY}` LIKE '%'"  # the query for runs of cells
SERVER_REQUESTS = 4  # at a time, as many as an MLflow server has processes by default
FIRST_PAGE_RUNS = 200  # of a server, for which nothing else can be asked at the same time
PROBE_SECONDS = 30.0  # a server that has answered less than this ago is not probed first

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# It logs the traceback of every error that it raises; our messages have the reason.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def default_uri(folder: Path) -> str:
    """The URI of the default store, an SQLite file in `folder`, for when MLFLOW_TRACKING_URI is not set."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


class Store:
    """An MLflow tracking store, by URI. Methods raise MLflowUnavailableError when it does not answer.

    An SQLite file that does not exist is created by the first method that is called; see `existing_store`. Raises ConfigError
    if there can be no store at the URI.
    """

    def __init__(self, uri: str) -> None:
        address.check_uri(uri)
        self._file = sqlite_file.path_of(uri)
        # The metrics logger has another working directory, where a relative path would be another file.
        self.uri = uri if self._file is None else f"{sqlite_file.PREFIX}{self._file}"
        self._outage = (0.0, "")  # until when the store is not asked, since it did not answer, and why it did not
        self._answered = -PROBE_SECONDS  # when it has answered last

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client. Making it may fail, and is tried again then: with a database it opens the store."""
        if self._file is not None:
            sqlite_file.migrate(self._file)
        return MlflowClient(self.uri)

    def connect(self) -> MlflowClient:
        """MLflow's client, unless it is known at once that the store does not answer."""
        with self.one_line_errors():
            return self.client

    def check(self) -> None:
        """Raises ConfigError if the store can never be written, MLflowUnavailableError if it does not answer."""
        if self._file is not None:
            existing = next(path for path in (self._file, *self._file.parents) if path.exists())
            if not os.access(existing, os.W_OK) or self._file.is_dir():
                problem = "is a folder" if self._file.is_dir() else "is not writable"
                raise ConfigError(f"MLflow's store {self.uri} {problem}; set MLFLOW_TRACKING_URI to another store")
        try:
            with self.one_line_errors():
                self.client.search_experiments(max_results=1)
        except MLflowUnavailableError as e:
            if sqlite_file.is_no_database(e.__cause__):
                raise ConfigError(str(e)) from e
            raise

    def check_exists(self) -> None:
        """Raises ConfigError if this is an SQLite file that does not exist: MLflow would create an empty one."""
        if self._file is not None and not (self._file.is_file() and self._file.stat().st_size):
            raise ConfigError(
                f"there is no MLflow store in {self._file.parent} (looked for {self._file.name}); run this in the folder of "
                "the study, or set MLFLOW_TRACKING_URI"
            )

    @property
    def is_server(self) -> bool:
        """Whether the store has a server, with pages of its own."""
        return self.uri.startswith(("http://", "https://"))

    def artifact_root(self) -> str:
        """The folder in which a server of this SQLite file keeps the artifacts of new experiments."""
        return (self._file.parent if self._file else Path.cwd()).joinpath("mlartifacts").as_uri()

    def artifact_folder(self, experiment: str) -> str | None:
        """The artifact folder of a new experiment, next to the SQLite file; None for a server, which has its own default."""
        return None if self._file is None else (self._file.parent / "mlartifacts" / experiment).as_uri()

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Sets tags immediately, without the metrics log."""
        with self.one_line_errors():
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def get_tag(self, run_id: str, key: str) -> str | None:
        """The current value of a tag; None if it is not set."""
        with self.one_line_errors():
            return self.client.get_run(run_id).data.tags.get(key)

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step of each metric of a run in MLflow, for a machine that lacks its metrics log."""
        with self.one_line_errors():
            metrics = self.client.get_run(run_id).data.metrics
            return {k: max(m.step for m in self.client.get_metric_history(run_id, k)) for k in metrics}

    def experiment_ids(self) -> list[str]:
        """The ids of all experiments that are not deleted. Raises the errors of MLflow: see `one_line_errors`."""
        found, token = list[Experiment](), None
        while True:  # MLflow returns at most a thousand at a time
            page = self.client.search_experiments(ViewType.ACTIVE_ONLY, page_token=token)
            found += page
            if not (token := page.token):
                return [experiment.experiment_id for experiment in found]

    def search_runs(self, experiment_ids: list[str], query: str, view_type: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        """All runs of experiments that a query of MLflow finds. Raises the errors of MLflow: see `one_line_errors`."""
        with _paused_garbage_collection():
            return self._search_from(experiment_ids, query, view_type, None)

    def search_cells(self, experiment_ids: list[str], query: str = "") -> list[Run]:
        """All runs of cells of experiments, or those that a query finds too. Raises the errors of MLflow.

        Reading thousands of runs is much work for MLflow, and each request the work of one of a server's processes. So after a
        first page, several requests at a time divide the other runs by the first digits of their keys.
        """
        condition = f" AND {query}" if query else ""
        with _paused_garbage_collection():
            if not self.is_server:
                return self._search_from(experiment_ids, CELLS + condition, ViewType.ACTIVE_ONLY, None)
            page = self.client.search_runs(experiment_ids, CELLS + condition, max_results=FIRST_PAGE_RUNS)
            if not page.token:
                return list(page)
            condition += f" AND attributes.start_time <= {page[-1].info.start_time}"  # the last started come first
            queries = [f"tags.`{KEY}` LIKE '{digit}%'{condition}" for digit in "0123456789abcdef"]
            with ThreadPoolExecutor(SERVER_REQUESTS) as pool:
                search = partial(self._search_from, experiment_ids, view_type=ViewType.ACTIVE_ONLY, token=None)
                found = {run.info.run_id: run for run in chain(page, *pool.map(search, queries))}
            return list(found.values())

    def _search_from(self, experiment_ids: list[str], query: str, view_type: int, token: Any) -> list[Run]:
        """The runs that a query finds, from the page of a token on; a token is a str of a server, and bytes of a database."""
        found = list[Run]()
        while True:
            page = self.client.search_runs(experiment_ids, query, view_type, page_token=token)
            found += page
            if not (token := page.token):
                return found

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Turns MLflow's errors into a ConfigError or MLflowUnavailableError of one line that names the store.

        A store that did not answer a moment ago is not asked again: the caller would wait for each of many requests.
        """
        began = time.monotonic()
        until, reason = self._outage
        if began < until:
            raise self._unavailable(reason)
        if began - self._answered > PROBE_SECONDS and (reason := address.outage_of(self.uri)):
            self._note_outage(began, reason)
            raise self._unavailable(reason)
        try:
            if self._file is not None:
                self._check_file(self._file)
            yield
            self._answered = time.monotonic()
        except (MlflowException, SQLAlchemyError, sqlite3.Error) as e:
            code = e.error_code if isinstance(e, MlflowException) else ""
            if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in str(e):
                raise ConfigError(
                    f"MLflow at {self.uri} refuses the user or the password; set MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD, or put them into ~/.mlflow/credentials"
                ) from e
            if code in ("", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):  # any other code is an answer
                self._note_outage(began, one_line(e))
            raise self._unavailable(one_line(e), e) from e

    def _note_outage(self, began: float, reason: str) -> None:
        now = time.monotonic()
        self._outage = now + min(max(MIN_OUTAGE_SECONDS, 3 * (now - began)), MAX_OUTAGE_SECONDS), reason
        self._answered = -PROBE_SECONDS

    def _check_file(self, file: Path) -> None:
        """Raises sqlite3.Error if the SQLite file is locked or damaged, or was deleted while it was in use."""
        if "client" in self.__dict__ and not (file.exists() and file.stat().st_size):
            raise sqlite3.OperationalError(f"{file} was deleted while it was in use")
        sqlite_file.revision_of(file)  # MLflow would wait twenty seconds for a locked file, and longer at first

    def _unavailable(self, reason: str, cause: BaseException | None = None) -> MLflowUnavailableError:
        advice = "start it, or set MLFLOW_TRACKING_URI" if self._file is None else "wait, or set MLFLOW_TRACKING_URI"
        if sqlite_file.is_no_database(cause):
            advice = "set MLFLOW_TRACKING_URI to another store"
        error = MLflowUnavailableError(f"MLflow at {self.uri} does not answer or fails; {advice}: {reason}")
        error.reason = reason
        return error


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Reading thousands of runs makes millions of objects, none of them garbage: two thirds of the time would be searches."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def existing_store(uri: str) -> Store:
    """The store at a URI, for commands that only read it. Raises ConfigError if it is an SQLite file that does not exist."""
    store = Store(uri)
    store.check_exists()
    return store
