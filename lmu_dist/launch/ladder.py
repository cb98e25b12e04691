"""What `lmu-dist ladder` does: every missing cell of a grid is trained exactly once, in Ray Tune trials. Returns the records.

A trial is a group of workers that takes one trunk after the other from a queue: the cells that share their steps before the
decay. Which cells have ended is read from their folders and from MLflow only, so the same command resumes a ladder after any
failure: `ladder_state` knows what is missing, and `ladder_driver` trains it. Progress goes to callbacks.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress

from lmu_dist import records, storage
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.progress import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.cluster import check_before_start, cluster
from lmu_dist.launch.corpus import prepare_corpus
from lmu_dist.launch.ladder_state import LadderResult, LadderState
from lmu_dist.launch.locks import exclusive_lock
from lmu_dist.launch.new_cell import at_half_rate, log_repeats, make_cell
from lmu_dist.launch.waves import Waves, plan_of
from lmu_dist.models import registry
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid
from lmu_dist.planning.plan_rows import to_row
from lmu_dist.tracking.errors import MLflowUnavailableError
from lmu_dist.tracking.runs import find_run, retire_run
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import write_plan
from lmu_dist.tracking.tags import LADDER_STUDY
from lmu_dist.tracking.upload import set_client_limits


def ladder(config: Config, tracking_uri: str, progress: Progress = lambda *_: None, rerun: Sequence[str] = ()) -> LadderResult:
    """Trains the missing cells of the grid. Raises ConfigError before anything starts if a cell cannot run.

    With `ladder.until` cells are trained in waves, and only until the intervals that it names are narrow enough.
    `rerun`: keys, or the starts of keys, of cells to train again although they have ended.
    """
    if config.ladder is None:
        raise ConfigError("this configuration has no section ladder; take jobs/quickstart.yaml as an example")
    set_client_limits()
    baseline = _baseline(config)
    store = Store(tracking_uri)
    claim.check_store(store, config)
    n_vocab = vocab_tokens(config)
    planned, _ = grid(config, n_vocab)
    check_before_start([cell.config for cell in planned])
    corpus = prepare_corpus(config, progress)
    corpus.tokenizer()
    if corpus.manifest.vocab_tokens != n_vocab:  # it was not prepared before
        planned, _ = grid(config, corpus.manifest.vocab_tokens)
    cells = list({cell.key: cell for cell in (make_cell(p.config, corpus) for p in planned)}.values())
    cells_to_rerun = [_cell_with_key(cells, key) for key in rerun]
    _write_plan(store, cells, baseline)
    waves = Waves(cells, config) if config.ladder.until is not None else None
    state = LadderState(cells, store, waves)
    if waves is not None:
        waves.choose([cell.key for cell in cells_to_rerun])
    if not cells_to_rerun and not state.next_trunks(n_slots=1):
        if waves is not None:
            _write_plan(store, cells, baseline, state.not_needed())
        claim.end_study(store, config, LADDER_STUDY, known=state.runs_for_study())
        return state.result(())
    log_repeats(cells)
    try:
        notes = _train(state, config, cells_to_rerun, progress)
    except BaseException as e:
        claim.end_study(store, config, LADDER_STUDY, "FAILED" if isinstance(e, FailedError) else "KILLED")
        raise
    _write_plan(store, cells, baseline, state.not_needed())  # again, if MLflow was unavailable at the start
    claim.end_study(store, config, LADDER_STUDY, "FAILED" if state.failures else "FINISHED", state.runs_for_study())
    return state.result(notes)


def _train(state: LadderState, config: Config, cells_to_rerun: Sequence[Cell], progress: Progress) -> tuple[str, ...]:
    """Trains what is missing, and the cells to rerun. Returns notes for the user about the shutdown."""
    from lmu_dist.launch.ladder_driver import CLOSING_SECONDS, LadderDriver  # imports Ray Tune, which takes over a second
    from lmu_dist.launch.trials import wait_for_release

    driver = LadderDriver(state, progress)
    try:
        with cluster([cell.config for cell in state.cells]):
            if state.waves is not None and not cells_to_rerun:
                state.waves.choose(())  # the cluster may have more slots than one
            for cell in cells_to_rerun:
                _reset(cell, state.store)
                state.forget(cell)
            driver.run(storage.local_state_dir(config.storage_folder) / "tune")
            return wait_for_release()
    except BaseException:
        driver.close(records.INTERRUPTED, CLOSING_SECONDS)
        raise


def _cell_with_key(cells: list[Cell], key: str) -> Cell:
    """The cell whose key, or whose retry's key, starts with `key`. Raises ConfigError unless there is exactly one."""
    found = [cell for cell in cells if cell.key.startswith(key) or at_half_rate(cell).key.startswith(key)]
    if len(found) != 1:
        raise ConfigError(
            f"--rerun {key}: {len(found) or 'no'} cells of this ladder have a key that starts with this; see lmu-dist status"
        )
    return found[0]


def _reset(cell: Cell, store: Store) -> None:
    """Deletes the folders of a cell and its retry. MLflow keeps their runs, without the tag of a cell."""
    for attempt in (cell, at_half_rate(cell)):
        if not attempt.folder.exists() and find_run(store, attempt.key) is None:
            continue
        with exclusive_lock(attempt):
            if (run := find_run(store, attempt.key)) is not None:
                claim.check_not_running_elsewhere(attempt, run)
                retire_run(store, run.info.run_id)
            storage.remove(attempt.folder)
            storage.remove(storage.local_state_dir(attempt.folder))
            storage.remove(attempt.trunk_folder / BRANCH_POINTS)


def _baseline(config: Config) -> str:
    """The name of the family in plan.baseline. Raises ConfigError if there is none of this name."""
    try:
        return registry.find(config.plan.baseline).name
    except ConfigError as e:
        raise ConfigError(f"plan.baseline: {e}") from e


def _write_plan(store: Store, cells: Sequence[Cell], baseline: str, not_needed: Collection[str] = ()) -> None:
    with suppress(MLflowUnavailableError, OSError):  # of the disk of temporary files or artifacts
        config = cells[0].config
        rows = [to_row(cell) for cell in plan_of(cells)]
        rows = [row | {"not_needed": row["key"] in not_needed} for row in rows]
        write_plan(store, config.experiment, LADDER_STUDY, rows, baseline)
