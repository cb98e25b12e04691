"""The waves of a ladder with `until`, with a driver that trains nothing: losses come from known laws. Without Ray."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmu_dist import records
from lmu_dist.config import Config, parse, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import ladder_driver
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.ladder_driver import LadderDriver
from lmu_dist.launch.ladder_state import LadderResult, LadderState
from lmu_dist.launch.new_cell import make_cell
from lmu_dist.launch.record import FinishedRun, Outcome, record_of_cell
from lmu_dist.launch.waves import Waves, plan_of, result_of
from lmu_dist.planning.grid import grid
from lmu_dist.planning.plan_rows import from_rows, to_row
from lmu_dist.planning.prices import total_cost
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.train.checkpoint import Meta

pytestmark = pytest.mark.filterwarnings("ignore")
LAW = Chinchilla(E=1.6, A=8.0, B=40.0, alpha=0.30, beta=0.29)
LAWS = {"transformer": LAW, "lmu": replace(LAW, B=LAW.B * 3**-LAW.beta)}
N_SLOTS = 3


@pytest.fixture(scope="module")
def corpus(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(job(corpus_glob).data, tmp_path_factory.mktemp("prepared"))


def job(corpus_glob: str) -> Config:
    return parse(
        {
            "experiment": "waves",
            "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
            "train": {"schedule": "wsd", "sequence_tokens": 32, "batch_tokens": 256, "warmup_tokens": 2560},
            "ladder": {
                "families": ["lmu", "transformer"],
                "n_params": [1000, 3000, 9000],
                "tokens": [1e5, 4e5, 16e5],
                "seeds": [0, 1, 2],
                "until": {"factor": 1.3},
            },
        }
    )


@pytest.fixture
def config(corpus_glob: str, tmp_path: Path) -> Config:
    return with_settings(job(corpus_glob), {"storage": str(tmp_path / "runs")})


def cells_of(config: Config, corpus: Corpus) -> list[Cell]:
    return [make_cell(cell.config, corpus) for cell in grid(config, corpus.manifest.vocab_tokens)[0]]


def trained(cell: Cell, status: str = records.COMPLETE) -> FinishedRun:
    """A run of a cell that has ended: its loss is that of the law, with noise of its own."""
    steps = cell.config.train.n_steps
    meta = Meta(steps, cell.key, 1, 1, "", "", "", {}, {}, train_loss_nats=5.5)
    record = record_of_cell(cell, Outcome(status, "decayed", "", meta))
    noise = float(np.random.default_rng(int(cell.key[:8], 16)).normal(0, 0.003))
    loss = float(LAWS[record.family].loss(record.n_params, record.tokens)) * np.exp(noise)
    return FinishedRun(cell, replace(record, val_loss_nats=loss), "", "", False, ())


class State(LadderState):
    """The state of a ladder that finds the runs in `trained`."""

    def __init__(self, cells: list[Cell], config: Config, store: Store):
        self.trained = dict[str, FinishedRun]()
        super().__init__(cells, store, Waves(cells, config))

    def refresh(self) -> None:
        self.finished |= self.trained


class Driver(LadderDriver):
    """A driver whose trials end at once. `failing` says which cells fail."""

    def __init__(self, cells: list[Cell], config: Config, store: Store, failing: Callable[[Cell], bool] = lambda _: False):
        state = State(cells, config, store)
        super().__init__(state)
        self.waves_run, self.failing, self.trained = list[list[str]](), failing, state.trained

    def _run_trials(self, scratch: Path, n_slots: int) -> list[Any]:
        wave = [cell for item in self.work_items for cell in item.cells]
        self.waves_run.append([cell.key for cell in wave])
        self.trained |= {cell.key: trained(cell) for cell in wave if not self.failing(cell)}
        self.state.failures |= {cell.name: "failed" for cell in wave if self.failing(cell)}
        return []

    def _update_work(self) -> None:
        pass

    def close(self, status: str, timeout_seconds: float) -> None:
        pass


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_driver, "capacity", lambda _: N_SLOTS)
    monkeypatch.setattr(ladder_driver, "head_node_id", lambda: "")
    for name in ("start_metrics_logger", "start_work_queue"):
        monkeypatch.setattr(ladder_driver, name, lambda *_: None)


def run(driver: Driver, tmp_path: Path) -> LadderResult:
    driver.run(tmp_path)
    return driver.state.result(())


@pytest.mark.usefixtures("no_ray", "machine")
def test_ladder_stops_by_its_rule_and_the_same_command_has_nothing_to_do(config: Config, corpus: Corpus, tmp_path: Path):
    cells, store = cells_of(config, corpus), Store(default_uri(tmp_path))
    first = Driver(cells, config, store)
    result = run(first, tmp_path)
    keys = [key for wave in first.waves_run for key in wave]
    assert len(keys) == len(set(keys)) == len(result.finished) < len(cells)
    assert len(first.waves_run) > 1
    assert "stopped, because the intervals are narrow enough" in result.stopped
    assert f"{len(keys)} of 54 cells" in result.stopped
    assert first.state.not_needed() == {cell.key for cell in cells} - set(keys)
    done = [cell for cell in plan_of(cells) if cell.key in first.state.finished]
    assert total_cost(done, "flops") < 0.8 * total_cost(plan_of(cells), "flops")
    again = State(cells, config, store)
    again.finished = dict(first.state.finished)
    assert again.next_trunks(N_SLOTS) == []
    assert again.result(()).stopped == result.stopped


@pytest.mark.usefixtures("no_ray", "machine")
def test_waves_fill_the_slots_and_a_trunk_is_one_work_item(config: Config, corpus: Corpus, tmp_path: Path):
    driver = Driver(cells_of(config, corpus), config, Store(default_uri(tmp_path)))
    run(driver, tmp_path)
    by_key = {cell.key: cell for cell in driver.state.cells}
    for wave in driver.waves_run[:-1]:
        assert len({by_key[key].trunk for key in wave}) >= N_SLOTS


@pytest.mark.usefixtures("no_ray", "machine")
def test_budget_is_not_exceeded_and_is_named(config: Config, corpus: Corpus, tmp_path: Path):
    cells = cells_of(config, corpus)
    budget = 0.2 * total_cost(plan_of(cells), "flops")
    config = with_settings(config, {"ladder.until": {"factor": 1.0001, "flops": budget}})
    driver = Driver(cells, config, Store(default_uri(tmp_path)))
    result = run(driver, tmp_path)
    done = [cell for cell in plan_of(cells) if cell.key in driver.state.finished]
    assert 0.5 * budget < total_cost(done, "flops") <= budget
    assert f"the budget of {budget:.3g} FLOPs is spent" in result.stopped
    assert "the intervals" not in result.stopped


@pytest.mark.usefixtures("no_ray", "machine")
def test_failed_cells_are_not_chosen_again_and_all_cells_are_an_end_too(
    config: Config, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = with_settings(config, {"ladder.until": {"factor": 1.0001}, "ladder.seeds": [0, 2]})
    monkeypatch.setattr(ladder_driver, "capacity", lambda _: 30)
    cells = cells_of(config, corpus)
    driver = Driver(cells, config, Store(default_uri(tmp_path)), lambda cell: cell.config.seed == 2)
    result = run(driver, tmp_path)
    assert len(result.finished) == 18
    assert len(result.failures) == 18
    assert "no cell is left that has not failed" in result.stopped
    assert sum(map(len, driver.waves_run)) == len({key for wave in driver.waves_run for key in wave}) == 36
    assert "all planned cells have ended" in run(Driver(cells, config, Store(default_uri(tmp_path))), tmp_path).stopped


@pytest.mark.usefixtures("machine")
def test_rows_of_the_plan_keep_what_the_design_needs(config: Config, corpus: Corpus):
    planned = plan_of(cells_of(config, corpus))
    assert from_rows([to_row(cell) for cell in planned]) == planned
    assert from_rows([{"name": "a", "key": "a", "planned_tokens": 1, "n_workers": 1}]) == []
    assert all(cell.decay_start == round(0.8 * cell.steps) for cell in planned)


@pytest.mark.usefixtures("machine")
def test_only_complete_runs_are_results(config: Config, corpus: Corpus):
    cell = cells_of(config, corpus)[0]
    assert result_of(trained(cell).record) is not None
    assert result_of(trained(cell, records.DIVERGED).record) is None
    assert result_of(replace(trained(cell).record, phase="undecayed")) is None
