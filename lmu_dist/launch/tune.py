"""The driver of a hyper-parameter search: a Config with a tune section in, the best settings per family and size out.

One Ray Tune search for every family and size, since losses of different sizes at equal tokens must not compete; ASHA compares
trials by tokens inside it. Every trial is a cell like any other: keyed, recorded, never run twice.
"""

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import optuna
from filelock import Timeout
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from lmu_dist import records
from lmu_dist.config import Config, ConfigError, FailedError, Family, Range, TrainConfig, TuneConfig, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import Progress, prepare
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell, make_cell
from lmu_dist.launch.claim import BusyError, Finished
from lmu_dist.launch.cluster import check_before, cluster, room
from lmu_dist.launch.record import Outcome, read_record, record_path
from lmu_dist.launch.series import run_series
from lmu_dist.launch.trials import check_state_api, run_trials, still_reserved
from lmu_dist.records import RunRecord
from lmu_dist.tracking.delivery import set_client_limits
from lmu_dist.tracking.store import Store
from lmu_dist.train import checkpoint

STUDY, LOSS, TOKENS = "tune", "val_loss_nats", "tokens"
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
    corpus = prepare(config.data, config.storage_folder, progress)
    corpus.tokenizer()
    searches = [_Driver(config, f, n, corpus, store, progress) for f in config.tune.families for n in config.tune.n_params]
    for search in searches:
        search.check()
    try:
        with cluster([config]):
            check_state_api()
            found = [search.run() for search in searches]
            held = still_reserved()
    except BaseException:
        for search in searches:
            search.close_interrupted()
        raise
    return found, (f"Ray still holds {len(held)} placement groups of trials that ended: {', '.join(held)}",) if held else ()


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

    def check(self) -> None:
        """Raises ConfigError if the ends of the ranges make no configuration."""
        for end in (0, -1):
            settings = {key: _values(where)[end] for key, where in self.tune.space.items()}
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
            {"base": self.base, "corpus": self.corpus, "tracking_uri": self.store.uri},
            self.base.storage_folder / "tune",
            ray_tune.TuneConfig(
                metric=LOSS,
                mode="min",
                search_alg=_searcher(self.tune, self.base.seed, concurrent),
                scheduler=_scheduler(self.tune, self.base.train),
                num_samples=1 if self.tune.search == "sweep" else self.n_trials,
            ),
            param_space={key: _domain(where, self.tune.search) for key, where in self.tune.space.items()},
            callbacks=[_Told(self)],
        )
        self.closing.shutdown()
        errors = [str((r.metrics or {}).get("error") or r.error or "") for r in results]
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

    def close_stopped(self, cell: Cell, report: dict[str, Any]) -> None:
        """Records a run that ASHA stopped: its workers are dead, or about to be, and cannot."""
        if "state" not in report:
            return
        state = checkpoint.Meta(**json.loads(report["state"]))
        rule = f"ASHA: not in the best 1/{self.tune.reduction_factor} of its rung at {report[TOKENS]:,} tokens"
        claim.close(cell, self.store, Outcome(records.STOPPED_EARLY, "undecayed", rule, state))

    def close_interrupted(self) -> None:
        """Says in MLflow that what was begun here is over for now."""
        self.closing.shutdown(cancel_futures=True)
        for _, cell in self.begun.values():
            if not record_path(cell).exists():
                with suppress(ConfigError, Timeout, OSError):
                    claim.close(cell, self.store, records.INTERRUPTED)


class _Told(ray_tune.Callback):
    """Tune says what happens to trials."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        settings = _settings(trial.config)
        with suppress(ConfigError):  # the trial itself will say so
            self._driver.begun[trial.trial_id] = settings, _cell(self._driver.base, settings, self._driver.corpus)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its end or was stopped. What is to be told waits for its workers' death, and Tune must not."""
        found = self._driver.begun.get(trial.trial_id)
        if found is not None and not record_path(found[1]).exists():
            driver = self._driver
            driver.closings.append(driver.closing.submit(driver.close_stopped, found[1], dict(trial.last_result)))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Every few seconds."""
        self._driver.tell()

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks into a snapshot that nobody reads."""
        return ray_tune.Callback, ()


class _Evaluations(TuneReportCallback):
    """Hands evaluations, and nothing else, from the workers to Tune."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train for every report."""
        if metrics and LOSS in metrics[0]:
            super().after_report(run_context, metrics, None)


def _try(params: dict[str, Any], base: Config, corpus: Corpus, tracking_uri: str) -> dict[str, Any]:
    """A trial: one cell, from where it stood; Tune hears of each of its evaluations, of earlier starts too."""
    set_client_limits()
    store = Store(tracking_uri)
    try:
        cell = _cell(base, _settings(params), corpus)
        known = store.find_run(cell.key)
        if known is not None:
            for tokens, loss in store.validations(known.info.run_id, cell.config.train.batch_tokens):
                ray_tune.report({TOKENS: tokens, LOSS: loss})
        finished = _wait_for_turn(cell, store)
    except (ConfigError, FailedError, OSError) as e:
        return {"error": str(e), TOKENS: 0, LOSS: WORST}
    record = finished.record
    return {TOKENS: record.tokens, LOSS: WORST if record.status == records.DIVERGED else record.val_loss_nats}


def _wait_for_turn(cell: Cell, store: Store) -> Finished:
    """Runs a cell; if another driver is at it, waits for what that comes to."""
    while True:
        try:
            [finished] = run_series([cell], store, STUDY, callbacks=[_Evaluations()])
            return finished
        except BusyError:
            time.sleep(5)


def _cell(base: Config, settings: dict[str, Any], corpus: Corpus) -> Cell:
    return make_cell(with_settings(base, settings), corpus)


def _settings(params: dict[str, Any]) -> dict[str, Any]:
    """What was drawn, with four digits: a learning rate has no more that matter."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in params.items()}


def _searcher(tune: TuneConfig, seed: int, concurrent: int) -> Any:
    if tune.search == "optuna":
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Optuna's ten random trials before it learns are more than many searches have in all.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, tune.samples // 3))
        return ConcurrencyLimiter(OptunaSearch(sampler=sampler), concurrent)
    return BasicVariantGenerator(random_state=seed, max_concurrent=concurrent)


def _scheduler(tune: TuneConfig, train: TrainConfig) -> Any:
    if tune.first_rung_tokens is None:
        return None
    return AsyncHyperBandScheduler(
        time_attr=TOKENS,
        max_t=2 * train.tokens,  # beyond every run: reaching the end of the budget is no reason to be stopped
        grace_period=train.eval_every_steps * train.batch_tokens,  # where the first evaluation falls, in whole batches
        reduction_factor=tune.reduction_factor,
        stop_last_trials=False,
    )


def _values(where: Range) -> tuple[Any, ...]:
    found = where.uniform or where.log or where.integer or where.log_integer or where.choice
    assert found is not None
    return found


def _domain(where: Range, search: str) -> Any:
    """As Ray Tune has it."""
    if where.choice is not None:
        return ray_tune.grid_search(list(where.choice)) if search == "sweep" else ray_tune.choice(list(where.choice))
    low, high = _values(where)
    if where.uniform or where.log:
        return (ray_tune.uniform if where.uniform else ray_tune.loguniform)(low, high)
    return (ray_tune.randint if where.integer else ray_tune.lograndint)(low, high + 1)
