"""The driver of a hyper-parameter search: a Config with a tune section in, the best settings per family and size out.

One Ray Tune search for every family and size, since losses of different sizes at equal tokens must not compete; ASHA compares
trials by tokens inside it. Every trial is a cell like any other: keyed, recorded, never run twice.
"""

import hashlib
import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from filelock import Timeout
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback

from lmu_dist import records, storage
from lmu_dist.config import Config, ConfigError, FailedError, Family, TuneConfig, to_dict, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import Progress
from lmu_dist.launch import claim, space
from lmu_dist.launch.cell import Cell, code_digest, make_cell
from lmu_dist.launch.claim import BusyError, Finished
from lmu_dist.launch.cluster import check_before, cluster, room
from lmu_dist.launch.corpus import prepared
from lmu_dist.launch.record import Outcome, read_record, record_path
from lmu_dist.launch.series import run_series
from lmu_dist.launch.space import LOSS, TOKENS
from lmu_dist.launch.trials import Watcher, check_state_api, driver_environment, run_trials, still_reserved, why
from lmu_dist.records import RunRecord
from lmu_dist.tracking.delivery import set_client_limits
from lmu_dist.tracking.store import AwayError, Store
from lmu_dist.train import checkpoint

STUDY = "tune"
CLOSING_SECONDS = 15.0  # what an interrupted search takes to say so in MLflow, for each of its runs
WORST = 1e9  # told of a trial that diverged


@dataclass(frozen=True)
class Trial:
    """One try: the settings that were drawn, and its record."""

    settings: dict[str, Any]
    record: RunRecord


@dataclass(frozen=True)
class Search:
    """All tries of one family at one size, best first: complete ones by their loss, then the others by tokens they lived."""

    family: Family
    n_params: int
    trials: tuple[Trial, ...]
    failures: tuple[str, ...]

    @property
    def best(self) -> Trial | None:
        """The winner; None if no trial came to its end."""
        return next((t for t in self.trials if t.record.status == records.COMPLETE), None)


def tune(config: Config, tracking_uri: str, progress: Progress = lambda *_: None) -> tuple[list[Search], tuple[str, ...]]:
    """Runs the searches of `config.tune`. Returns them and what a person should know. Raises ConfigError, FailedError."""
    if config.tune is None:
        raise ConfigError("this configuration has no section tune; take jobs/tune_lr.yaml as an example")
    set_client_limits()
    store = Store(tracking_uri)
    store.check()
    check_before([config])
    corpus = prepared(config, progress)
    corpus.tokenizer()
    searches = [_Driver(config, f, n, corpus, store, progress) for f in config.tune.families for n in config.tune.n_params]
    for search in searches:
        search.check()
    try:
        with cluster([config]):
            check_state_api()
            found = [search.run() for search in searches]
            notes = still_reserved()
    except BaseException:
        for search in searches:
            search.close_interrupted()
        raise
    return found, notes


class _Driver:
    """One search while its driver lives."""

    def __init__(self, config: Config, family: Family, n_params: int, corpus: Corpus, store: Store, progress: Progress) -> None:
        assert config.tune is not None
        self.tune: TuneConfig = config.tune
        first_rung = self.tune.first_rung_tokens
        settings = {"model.family": family, "model.n_params": n_params, "tune": None, "ladder": None}
        settings |= {"storage": str(config.storage_folder)}  # trials have working folders of their own
        # Rungs are only seen where there is an evaluation.
        settings |= {"train.eval_every_tokens": first_rung} if first_rung else {}
        self.base = with_settings(config, settings)
        self.family: Family = family
        self.n_params, self.corpus, self.store, self.progress = n_params, corpus, store, progress
        self.n_trials = self.tune.n_trials
        self.closing, self.closings = ThreadPoolExecutor(1), list[Future[None]]()
        self.begun: dict[str, tuple[dict[str, Any], Cell]] = {}  # by trial
        self.ended = (*claim.RESULTS, records.STOPPED_EARLY) if first_rung else claim.RESULTS
        content = json.dumps([to_dict(self.base), to_dict(config)["tune"], corpus.manifest.data_digest, code_digest()])
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.journal = self.base.storage_folder / "tune" / f"{family}-{n_params}-{digest}.json"
        self.drawn = self._drawn_before()

    def check(self) -> None:
        """Raises ConfigError if the ends of the ranges make no configuration."""
        for end in (0, -1):
            settings = {key: space.values(where)[end] for key, where in self.tune.space.items()}
            try:
                make_cell(with_settings(self.base, settings), self.corpus)
            except ConfigError as e:
                raise ConfigError(f"tune.space: {settings} is an impossible configuration: {e}") from e

    def run(self) -> Search:
        """The search, to its end."""
        self.tell()
        concurrent = max(1, room(self.base) // self.base.cluster.n_workers)
        results = run_trials(
            _try,
            {
                "base": self.base,
                "corpus": self.corpus,
                "tracking_uri": self.store.uri,
                "environment": driver_environment(),
                "ended": self.ended,
            },
            storage.beside(self.base.storage_folder) / "tune",
            ray_tune.TuneConfig(
                metric=LOSS,
                mode="min",
                search_alg=space.searcher(self.tune, self.base.seed, concurrent, self.drawn),
                scheduler=space.scheduler(self.tune, self.base.train),
                num_samples=1 if self.tune.search == "sweep" else self.n_trials,
            ),
            param_space={key: space.domain(where, self.tune.search) for key, where in self.tune.space.items()},
            callbacks=[Watcher(self._begin, self._end, self.tell)],
        )
        self.closing.shutdown()
        errors = [why(result) for result in results]
        errors += [f"a stopped run was not closed: {error}" for f in self.closings if (error := f.exception())]
        tried = {cell.key: Trial(s, read_record(cell)) for s, cell in self.begun.values() if record_path(cell).exists()}
        complete = [t for t in tried.values() if t.record.status == records.COMPLETE]
        others = [t for t in tried.values() if t.record.status != records.COMPLETE]
        complete.sort(key=lambda t: t.record.val_loss_nats)
        others.sort(key=lambda t: -t.record.tokens)
        return Search(self.family, self.n_params, (*complete, *others), tuple(e for e in errors if e))

    def tell(self) -> None:
        """Brings the progress up to date."""
        ended = sum(record_path(cell).exists() for _, cell in list(self.begun.values()))
        what = f"{self.family}, N = {self.n_params:,}"
        self.progress(what, ended, self.n_trials, f"{ended} of {self.n_trials} trials ended")

    def _begin(self, trial: Any) -> None:
        settings = space.settings(trial.config)
        with suppress(ConfigError):  # the trial itself will say so
            self.begun[trial.trial_id] = settings, _cell(self.base, settings, self.corpus)
            self._remember(settings)

    def _end(self, trial: Any, died: bool) -> None:
        # What is to be told waits for the death of the run's processes, which Tune, in this thread, sees to.
        found = self.begun.get(trial.trial_id)
        if found is not None and not record_path(found[1]).exists():
            report = {} if died else dict(trial.last_result)
            self.closings.append(self.closing.submit(self._close, found[1], report))

    def _close(self, cell: Cell, report: dict[str, Any]) -> None:
        """Records a run that ASHA stopped, or whose trial died: its workers are dead, or about to be, and cannot."""
        if "error" in report:
            return  # the trial came to its end, and its run was closed
        if not report:
            claim.close(cell, self.store, records.FAILED)
            return
        # Without a state the trial was stopped while it told of an earlier start: where that stood is in its checkpoint.
        state = (
            checkpoint.Meta(**json.loads(report["state"])) if "state" in report else checkpoint.newest_intact(cell.folder)[1]
        )
        if state is None:
            raise FailedError(f"{cell.name} was stopped before it had a checkpoint")
        rule = f"ASHA: not in the best 1/{self.tune.reduction_factor} of its rung at {report[TOKENS]:,} tokens"
        claim.close(cell, self.store, Outcome(records.STOPPED_EARLY, "undecayed", rule, state))

    def _remember(self, settings: dict[str, Any]) -> None:
        if self.tune.search == "optuna" and settings not in self.drawn:
            self.drawn.append(settings)
            storage.make_folder(self.journal.parent)
            storage.write_whole(self.journal, json.dumps(self.drawn).encode())

    def _drawn_before(self) -> list[dict[str, Any]]:
        """What an earlier start of this search has drawn, in order: it goes on with that."""
        return json.loads(self.journal.read_text()) if self.journal.exists() else []

    def close_interrupted(self) -> None:
        """Says in MLflow that what was begun here is over for now."""
        self.closing.shutdown(cancel_futures=True)
        for _, cell in self.begun.values():
            if not record_path(cell).exists():
                with suppress(ConfigError, Timeout, OSError):
                    claim.close(cell, self.store, records.INTERRUPTED, CLOSING_SECONDS)


class _Evaluations(TuneReportCallback):
    """Hands evaluations, and nothing else, from the workers to Tune."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train for every report."""
        if metrics and LOSS in metrics[0]:
            super().after_report(run_context, metrics, None)


def _try(
    params: dict[str, Any],
    base: Config,
    corpus: Corpus,
    tracking_uri: str,
    environment: dict[str, str],
    ended: tuple[str, ...],
) -> dict[str, Any]:
    """A trial: one cell, from where it stood; Tune hears of each of its evaluations, of earlier starts too."""
    os.environ.update(environment)
    set_client_limits()
    try:
        store = Store(tracking_uri)
        cell = _cell(base, space.settings(params), corpus)
        known = store.find_run(cell.key)
        if known is not None:
            for tokens, loss in store.validations(known.info.run_id, cell.config.train.batch_tokens):
                ray_tune.report({TOKENS: tokens, LOSS: loss})
        finished = _wait_for_turn(cell, store, ended)
    except (ConfigError, FailedError, OSError) as e:
        return {"error": str(e), TOKENS: 0, LOSS: WORST}
    record = finished.record
    return {TOKENS: record.tokens, LOSS: WORST if record.status == records.DIVERGED else record.val_loss_nats}


def _wait_for_turn(cell: Cell, store: Store, ended: tuple[str, ...]) -> Finished:
    """Runs a cell; if another driver is at it, or MLflow is away, waits."""
    while True:
        try:
            [finished] = run_series([cell], store, STUDY, callbacks=[_Evaluations()], ended=ended)
            return finished
        except (BusyError, AwayError):
            time.sleep(5)


def _cell(base: Config, settings: dict[str, Any], corpus: Corpus) -> Cell:
    return make_cell(with_settings(base, settings), corpus)
