"""A hyper-parameter search on Ray: ASHA stops trials, their runs are closed, and a ladder can include the best settings."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from lmu_dist import records
from lmu_dist.cli import main
from lmu_dist.config import Config, ConfigError, FailedError, load, parse, with_settings
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import tune as launch_tune
from lmu_dist.launch.tune import tune
from lmu_dist.planning.grid import grid
from lmu_dist.tracking.runs import runs_of
from lmu_dist.tracking.store import Store, default_uri

# Ray and DeepSpeed raise warnings, and keep sockets open until the process ends.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
RATES = [1e-2, 1e-5]


def configured(corpus_glob: str, storage: Path, **search: object) -> Config:
    choice = {"train.learning_rate": {"choice": RATES}}
    tree = {
        "experiment": "search",
        "storage": str(storage),
        "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
        "train": {"tokens": 102_400, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560, "eval_tokens": 512},
        "tune": {"families": ["lmu"], "n_params": [1000], "space": choice, "search": "sweep"} | search,
        "cluster": {"n_workers": 1},
    }
    return parse(tree)


def test_asha_stops_trials_and_closes_their_runs(corpus_glob: str, local_ray: str, tmp_path: Path, monkeypatch, capfd):
    config = configured(corpus_glob, tmp_path, first_rung_tokens=12_800, reduction_factor=2)
    config = with_settings(config, {"cluster.cpus_per_worker": 4})  # one trial at a time: the worse one is the second
    job = tmp_path / "job.yaml"
    tree = {"experiment": "search", "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}}
    job.write_text(json.dumps(tree | {"include": "winners.yaml"}))
    [search], notes = tune(config, default_uri(tmp_path))
    assert not notes
    assert not search.failures
    assert len(search.trials) == len(RATES)
    assert search.best is not None
    assert search.best.settings["train.learning_rate"] == RATES[0]
    stopped = [t.record for t in search.trials if t.record.status == records.STOPPED_EARLY]
    assert stopped
    assert all("ASHA" in r.stop_rule and r.phase == "undecayed" and 12_800 <= r.tokens < 102_400 for r in stopped)
    assert sum(t.record.tokens for t in search.trials) < 0.8 * len(RATES) * 102_400
    store = Store(default_uri(tmp_path))
    runs = {run.data.tags["lmu.key"]: run for run in runs_of(store, "search")}
    assert len(runs) == len(RATES)
    for record in stopped:
        run = runs[record.key]
        assert (run.info.status, run.data.tags["lmu.status"]) == ("KILLED", records.STOPPED_EARLY)
        assert run.data.metrics["final/val_loss_nats"] == pytest.approx(record.val_loss_nats)
    # No trial is trained twice, and no stopped trial is continued: nothing is left for which Ray would have to start anything.
    with monkeypatch.context() as patch:
        patch.setattr(launch_tune, "cluster", None)
        assert tune(config, default_uri(tmp_path)) == ([search], ())

    monkeypatch.setattr(launch_tune, "tune", lambda *_: ([search], ()))
    tune_job = tmp_path / "tune.yaml"
    tune_job.write_text(
        json.dumps(
            {
                "train": {"tokens": 102_400, "warmup_tokens": 2560},
                "tune": {
                    "families": ["lmu"],
                    "n_params": [1000],
                    "search": "sweep",
                    "space": {"train.learning_rate": {"choice": RATES}},
                },
            }
        )
    )
    assert main(["tune", str(tune_job), "-o", str(tmp_path / "winners.yaml")]) == 0
    assert "best" in capfd.readouterr().out
    assert (tmp_path / "winners.png").stat().st_size > 5000
    ladder = ["ladder.families=[lmu]", "ladder.n_params=[1000]", "ladder.tokens=[1e6]"]
    assert load(job, ladder).ladder.tuned[0].tokens == 102_400  # pyright: ignore[reportOptionalMemberAccess]
    [cell], _ = grid(load(job, ladder), 400)
    assert cell.config.train.learning_rate == search.best.settings["train.learning_rate"]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"space": {"train.tokens": {"choice": [1]}}}, "train.tokens cannot be tuned"),
        ({"space": {"train.learning_rate": {"log": [1e-1, 1e-3]}}}, "must be below the high end"),
        ({"space": {"train.learning_rate": {"log": [1e-3, 1e-1], "choice": [1]}}}, "give exactly one of"),
        ({"space": {"train.learning_rate": {"log": [1e-3, 1e-1]}}}, "needs a choice .* because a sweep tries every value"),
        ({"space": {}}, "space"),
    ],
)
def test_invalid_search_is_a_config_error(corpus_glob: str, tmp_path: Path, search: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        configured(corpus_glob, tmp_path, **search)


def test_range_with_an_invalid_end_is_refused_before_anything_starts(corpus_glob: str, tmp_path: Path):
    space = {"train.warmup_tokens": {"choice": [1000, 1_000_000]}}
    with pytest.raises(ConfigError, match=r"tune\.space: .*warmup_tokens.* must be less"):
        tune(configured(corpus_glob, tmp_path, space=space), default_uri(tmp_path))
    assert not list(tmp_path.glob("lmu-*"))


def test_a_sweep_with_an_invalid_combination_has_not_ended(corpus_glob: str, tmp_path: Path, monkeypatch):
    """Its trial says what is wrong, also after all others have ended, and does not stop them."""
    config = configured(corpus_glob, tmp_path, space={"train.warmup_tokens": {"choice": [1000, 1_000_000, 2000]}})
    corpus = prepare(config.data, config.storage_folder)
    driver = launch_tune._Driver(config, "lmu", 1000, corpus, Store(default_uri(tmp_path)), lambda *_: None)
    assert len(driver.cells_at_the_ends()) == 2  # the ends are valid
    monkeypatch.setattr(launch_tune.claim, "find_finished", lambda cell, *_, **__: Mock(record=cell.key))
    monkeypatch.setattr(launch_tune, "TrialResult", Mock())
    assert not driver.has_ended()


def test_a_budget_that_repeats_the_corpus_is_logged_once(corpus_glob: str, tmp_path: Path, monkeypatch, caplog):
    config = with_settings(configured(corpus_glob, tmp_path, n_params=[1000, 3000]), {"train.tokens": 2_560_000})
    monkeypatch.setattr(launch_tune, "cluster", Mock(side_effect=FailedError("no cluster")))
    with pytest.raises(FailedError, match="no cluster"):
        tune(config, default_uri(tmp_path))
    [line] = [message for message in caplog.messages if message.startswith("epochs: ")]
    assert "their runs: 2,560,000 (" in line


def test_a_trial_whose_cell_cannot_be_looked_up_ends_with_the_error(corpus_glob: str, tmp_path: Path, monkeypatch):
    """It would wait for its cell for ever."""
    config = configured(corpus_glob, tmp_path)
    driver = launch_tune._Driver(
        config, "lmu", 1000, prepare(config.data, config.storage_folder), Store(default_uri(tmp_path)), lambda *_: None
    )
    driver.queue = Mock()
    monkeypatch.setattr(launch_tune, "find_run", Mock(side_effect=FailedError("two runs have the key")))
    driver._trial_started(Mock(trial_id="t", config={"train.learning_rate": 0.01}))
    driver.starter.shutdown()
    [(trial_id, given)] = [call.args for call in driver.queue.give_to_search_trial.remote.call_args_list]
    assert (trial_id, given.cell, given.error) == ("t", None, "two runs have the key")
    driver._trial_started(Mock(trial_id="u", config={"train.warmup_tokens": 1_000_000}))
    [_, (trial_id, given)] = [call.args for call in driver.queue.give_to_search_trial.remote.call_args_list]
    assert (trial_id, given.cell) == ("u", None)
    assert "warmup_tokens" in given.error
