"""The driver of `lmu-dist tune`: a hyper-parameter search. Returns the best settings for each family and model size.

There is one Ray Tune search for each family and size, because losses of different sizes at equal tokens must not compete. In a
search ASHA compares trials by tokens. Every trial is a cell as in a ladder: it has a key and a record, and is trained once.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from filelock import Timeout
from ray import tune as ray_tune

from lmu_dist import records, storage
from lmu_dist.config import Config, ConfigError, FailedError, Family, Folder, TuneConfig, flatten, to_dict, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.progress import Progress
from lmu_dist.launch import claim, space
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.cluster import capacity, check_before_start, cluster
from lmu_dist.launch.corpus import prepare_corpus
from lmu_dist.launch.dispatcher import Services
from lmu_dist.launch.metrics_logger import release_log, start_metrics_logger
from lmu_dist.launch.new_cell import log_repeats, make_cell
from lmu_dist.launch.record import FINAL_STATUSES, Outcome, read_record, record_path
from lmu_dist.launch.trials import (
    TrialCallback,
    driver_environment,
    error_message,
    head_node_id,
    run_trials,
    wait_for_release,
)
from lmu_dist.launch.tune_report import LOSS, TOKENS
from lmu_dist.launch.tune_trial import train_trial
from lmu_dist.launch.work_queue import SearchTrial, start_work_queue
from lmu_dist.models import registry
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid, unset_unknown_options
from lmu_dist.planning.recipes import recipe_settings
from lmu_dist.records import RunRecord
from lmu_dist.tracking.errors import MLflowUnavailableError
from lmu_dist.tracking.runs import find_run, validation_losses
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.upload import set_client_limits
from lmu_dist.train import VERSION, checkpoint

STUDY = "tune"
N_STARTERS = 8  # trials whose earlier evaluations are looked up at the same time; each waits for MLflow if it does not answer
CLOSING_SECONDS = 15.0  # timeout of an interrupted search for closing an MLflow run


@dataclass(frozen=True)
class TrialResult:
    """One trial: the sampled settings and the record of its run."""

    settings: dict[str, Any]
    record: RunRecord


@dataclass(frozen=True)
class SearchResult:
    """All trials of one family and size: complete ones by ascending loss, then the others by descending tokens."""

    family: Family
    n_params: int
    trials: tuple[TrialResult, ...]
    failures: tuple[str, ...]

    @property
    def best(self) -> TrialResult | None:
        """The complete trial with the lowest loss; None if no trial is complete."""
        return next((t for t in self.trials if t.record.status == records.COMPLETE), None)


def tune(config: Config, tracking_uri: str, progress: Progress = lambda *_: None) -> tuple[list[SearchResult], tuple[str, ...]]:
    """Runs the searches of `config.tune`. Returns their results and notes for the user. Raises ConfigError, FailedError."""
    if config.tune is None:
        raise ConfigError("this configuration has no section tune; take jobs/tune_lr.yaml as an example")
    set_client_limits()
    store = Store(tracking_uri)
    claim.check_store(store, config)
    check_before_start([config])
    grid(with_settings(config, {"ladder": None}), vocab_tokens(config))  # refuses an impossible size before preparing
    corpus = prepare_corpus(config, progress)
    corpus.tokenizer()
    drivers = [_Driver(config, f, n, corpus, store, progress) for f in config.tune.families for n in config.tune.n_params]
    ends = [cell for driver in drivers for cell in driver.cells_at_the_ends()]
    missing = [driver for driver in drivers if not driver.has_ended()]
    if not missing:
        claim.end_study(store, config, STUDY)
        return [driver.result(()) for driver in drivers], ()
    log_repeats(ends)
    try:
        with cluster([config]):
            head = head_node_id()
            services = Services(store.uri, STUDY, start_metrics_logger(store.uri, head), start_work_queue([], 0, head))
            results = [driver.run(services) if driver in missing else driver.result(()) for driver in drivers]
            notes = wait_for_release()
    except BaseException as e:
        for driver in drivers:
            driver.close_interrupted()
        claim.end_study(store, config, STUDY, "FAILED" if isinstance(e, FailedError) else "KILLED")
        raise
    claim.end_study(store, config, STUDY, "FAILED" if any(result.failures for result in results) else "FINISHED")
    return results, notes


class _Driver:
    """The state of one search: its sampled settings and the cells of its trials."""

    def __init__(self, config: Config, family: Family, n_params: int, corpus: Corpus, store: Store, progress: Progress) -> None:
        assert config.tune is not None
        self.tune: TuneConfig = config.tune
        first_rung = self.tune.first_rung_tokens
        settings: dict[str, Any] = {
            "model.family": registry.absolute_reference(family),
            "model.n_params": n_params,
            "tune": None,
            "ladder": None,
        }
        settings |= recipe_settings(config, family) | unset_unknown_options(config, family)
        settings |= {"storage": str(config.storage_folder)}  # trials have working folders of their own
        # ASHA sees a rung only where there is an evaluation.
        settings |= {"train.eval_every_tokens": first_rung} if first_rung else {}
        self.base = with_settings(config, settings)
        self.family: Family = family
        self.family_name = registry.find(family).name
        self.n_params, self.corpus, self.store, self.progress = n_params, corpus, store, progress
        self.n_trials = self.tune.n_trials
        self.release_log: Callable[[Folder], None] = lambda _: None  # until there is a metrics logger
        self.queue: Any = None  # the WorkQueue through which trials get their cells
        self.starter = ThreadPoolExecutor(N_STARTERS)
        self.closer, self.closings = ThreadPoolExecutor(1), list[Future[None]]()
        self.started: dict[str, tuple[dict[str, Any], Cell]] = {}  # settings and cell, by the id of the trial
        self.known: dict[str, TrialResult] = {}  # trials that had ended before, by key
        self.final_statuses = (*FINAL_STATUSES, records.STOPPED_EARLY) if first_rung else FINAL_STATUSES
        versions = [registry.version_of(registry.find(family), self.base.model.options), VERSION]
        # Only what differs from a default, so that a key added by a later version does not start the search anew.
        defaults = flatten(to_dict(Config()))
        settings = {key: value for key, value in flatten(to_dict(self.base)).items() if value != defaults.get(key)}
        settings = {key: value for key, value in settings.items() if not key.startswith("cluster.")}
        content = json.dumps([settings, to_dict(config)["tune"], corpus.manifest.data_digest, versions])
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.journal = self.base.storage_folder / "tune" / f"{self.family_name}-{n_params}-{digest}.json"
        self.samples = self._read_journal()

    def cells_at_the_ends(self) -> list[Cell]:
        """The cells at the low ends and at the high ends of all ranges. Raises ConfigError if one is invalid."""
        cells = list[Cell]()
        for end in (0, -1):
            settings = {key: space.values(search_range)[end] for key, search_range in self.tune.space.items()}
            try:
                cells.append(_cell(self.base, settings, self.corpus))
            except ConfigError as e:
                raise ConfigError(f"tune.space: {settings} is an invalid configuration: {e}") from e
        return cells

    def has_ended(self) -> bool:
        """Whether every trial has ended, which is known of a sweep only: other searches sample their trials as they run."""
        if self.tune.search != "sweep":
            return False
        for values in itertools.product(*(space.values(search_range) for search_range in self.tune.space.values())):
            settings = space.settings(dict(zip(self.tune.space, values, strict=True)))
            try:
                cell = _cell(self.base, settings, self.corpus)
            except ConfigError:
                return False  # its trial reports the error, and the others are trained
            finished = claim.find_finished(cell, self.store, STUDY, final_statuses=self.final_statuses)
            if finished is None:
                return False
            self.known[cell.key] = TrialResult(settings, finished.record)
        return True

    def run(self, services: Services) -> SearchResult:
        """Runs the search and returns its result."""
        self.report_progress()
        self.release_log = partial(release_log, services.metrics_logger)
        self.queue = services.queue
        max_concurrent = max(1, capacity(self.base) // self.base.cluster.n_workers)
        results = run_trials(
            train_trial,
            {"services": services, "environment": driver_environment(), "final_statuses": self.final_statuses},
            storage.local_state_dir(self.base.storage_folder) / "tune",
            ray_tune.TuneConfig(
                metric=LOSS,
                mode="min",
                search_alg=space.searcher(self.tune, self.base.seed, max_concurrent, self.samples),
                scheduler=space.scheduler(self.tune, self.base.train),
                num_samples=1 if self.tune.search == "sweep" else self.n_trials,
            ),
            param_space={key: space.domain(search_range, self.tune.search) for key, search_range in self.tune.space.items()},
            callbacks=[TrialCallback(self._trial_started, self._trial_ended, self.report_progress)],
        )
        self.starter.shutdown()
        self.closer.shutdown()
        errors = [error_message(result) for result in results]
        errors += [
            f"the MLflow run of a stopped trial was not closed: {error}" for f in self.closings if (error := f.exception())
        ]
        return self.result([error for error in errors if error])

    def result(self, errors: Sequence[str]) -> SearchResult:
        """The result of the trials that have ended."""
        ended = [(settings, cell) for settings, cell in self.started.values() if record_path(cell).exists()]
        trials = self.known | {cell.key: TrialResult(settings, read_record(cell)) for settings, cell in ended}
        complete = [t for t in trials.values() if t.record.status == records.COMPLETE]
        others = [t for t in trials.values() if t.record.status != records.COMPLETE]
        complete.sort(key=lambda t: t.record.val_loss_nats)
        others.sort(key=lambda t: -t.record.tokens)
        return SearchResult(self.family, self.n_params, (*complete, *others), tuple(errors))

    def report_progress(self) -> None:
        """Updates the progress bar."""
        ended = sum(record_path(cell).exists() for _, cell in list(self.started.values()))
        label = f"{self.family_name}, N = {self.n_params:,}"
        self.progress(label, ended, self.n_trials, f"{ended} of {self.n_trials} trials ended")

    def _trial_started(self, trial: Any) -> None:
        settings = space.settings(trial.config)
        try:
            cell = _cell(self.base, settings, self.corpus)
        except ConfigError as e:
            self.queue.give_to_search_trial.remote(trial.trial_id, SearchTrial(None, error=str(e)))
            return
        self.started[trial.trial_id] = settings, cell
        self._write_journal(settings)
        self.starter.submit(self._give_cell, trial.trial_id, cell)  # in another thread, because MLflow may be slow

    def _give_cell(self, trial_id: str, cell: Cell) -> None:
        evaluations: Sequence[tuple[int, float]] = ()
        try:
            with suppress(MLflowUnavailableError):  # ASHA then sees the next evaluations only
                if (run := find_run(self.store, cell.key)) is not None:
                    evaluations = validation_losses(self.store, run.info.run_id, cell.config.train.batch_tokens)
            given = SearchTrial(cell, tuple(evaluations))
        except Exception as e:  # noqa: BLE001 - the trial would wait for ever
            given = SearchTrial(None, error=storage.error_text(e))
        self.queue.give_to_search_trial.remote(trial_id, given)

    def _trial_ended(self, trial: Any, died: bool) -> None:
        # In another thread, because closing a run waits until its processes are dead, and Tune ends them in this thread.
        started = self.started.get(trial.trial_id)
        if started is not None and not record_path(started[1]).exists():
            report = {} if died else dict(trial.last_result)
            self.closings.append(self.closer.submit(self._close, started[1], report))

    def _close(self, cell: Cell, report: dict[str, Any]) -> None:
        """Closes a run that ASHA stopped, or whose trial died, because its workers cannot: they are dead or dying."""
        if "error" in report:
            return  # the trial returned, and its run is closed
        if not report:
            claim.close_run(cell, self.store, STUDY, records.FAILED, release_log=self.release_log)
            return
        # Without a state the trial was stopped while it reported the evaluations of an earlier start, which left a checkpoint.
        state = (
            checkpoint.meta_from_json(json.loads(report["state"]))
            if "state" in report
            else checkpoint.newest_intact(cell.folder)[1]
        )
        if state is None:
            raise FailedError(f"{cell.name} was stopped before it had a checkpoint")
        rule = f"ASHA: not in the best 1/{self.tune.reduction_factor} of its rung at {report[TOKENS]:,} tokens"
        outcome = Outcome(records.STOPPED_EARLY, "undecayed", rule, state)
        claim.close_run(cell, self.store, STUDY, outcome, release_log=self.release_log)

    def _write_journal(self, settings: dict[str, Any]) -> None:
        if self.tune.search == "optuna" and settings not in self.samples:
            self.samples.append(settings)
            storage.make_folder(self.journal.parent)
            storage.write_atomic(self.journal, json.dumps(self.samples).encode())

    def _read_journal(self) -> list[dict[str, Any]]:
        """The settings that earlier starts of this search have sampled, in order; the search resumes with them."""
        if not self.journal.exists():
            return []
        try:
            return [dict(settings) for settings in json.loads(self.journal.read_text())]
        except (ValueError, TypeError) as e:
            raise ConfigError(f"{self.journal} is damaged; delete it, and the search samples again") from e

    def close_interrupted(self) -> None:
        """Closes the MLflow runs of the trials that were started and have not ended, as interrupted."""
        self.starter.shutdown(cancel_futures=True)
        self.closer.shutdown(cancel_futures=True)
        for _, cell in self.started.values():
            if not record_path(cell).exists():
                with suppress(ConfigError, FailedError, Timeout, OSError):
                    claim.close_run(cell, self.store, STUDY, records.INTERRUPTED, CLOSING_SECONDS, self.release_log)


def _cell(base: Config, settings: dict[str, Any], corpus: Corpus) -> Cell:
    return make_cell(with_settings(base, settings), corpus)
