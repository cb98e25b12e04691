"""From MLflow to a study: what is used, what is left out and why; quickly, and from another experiment where it must."""

import csv
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from simulate import record, study, write

from lmu_dist.config import ConfigError
from lmu_dist.scaling.collect import Study, collect, labels, rows, write_runs
from lmu_dist.tracking.store import Store, default_uri


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(default_uri(tmp_path))


SMALL = study(families=("lmu", "transformer"), sizes=(10_000, 100_000), budgets=(10**6, 10**7))


def test_a_study_is_what_was_recorded(store: Store):
    ids = write(store.client, "e", SMALL)
    found = collect(store, "e")
    assert {run.run_id: run.record for run in found.runs} == dict(zip(ids, SMALL, strict=True))
    assert (found.families, found.rungs, found.left_out) == (("lmu", "transformer"), (10_000, 100_000), ())
    assert found.source == "simulation"
    table = rows(found.of("lmu"))
    assert list(table.loss) == [r.val_loss_nats for r in SMALL if r.family == "lmu"]
    assert list(rows(found.of("lmu"), with_head=True).n_params) == [r.n_params_with_head for r in SMALL if r.family == "lmu"]


def test_families_that_miss_a_size_by_a_little_are_compared_at_it(store: Store):
    write(store.client, "e", [record("lmu", 10_120, 10**6, 0, 4.0), record("transformer", 9_990, 10**6, 0, 4.2)])
    assert collect(store, "e").rungs == (9_990,)


def test_what_is_left_out_and_why(store: Store):
    good = record("lmu", 10_000, 10**6, 0, 4.0)
    bad = {
        "undecayed": {"phase": "undecayed", "seed": 1},
        "stopped early: asha at step 7": {"status": "stopped_early", "stop_rule": "asha at step 7", "seed": 2},
        "diverged": {"status": "diverged", "seed": 3},
        "other data": {"data_digest": "e" * 64, "seed": 4},
        "other code": {"code_digest": "e" * 64, "seed": 5},
        "other sequence length": {"sequence_tokens": 64, "seed": 6},
        "not the best settings: rate 0.5": {"learning_rate": 0.5, "val_loss_nats": 4.5},
        "no loss": {"val_loss_nats": float("nan"), "seed": 8},
    }
    made = [good, record("transformer", 10_000, 10**6, 0, 4.2)]
    made += [replace(good, **changes, key=reason) for reason, changes in bad.items()]
    ids = write(store.client, "e", made)
    experiment_id, study_id = store.open_study("e", "ladder")
    store.create_run(experiment_id, study_id, "begun", "k" * 64, "/nowhere")
    found = collect(store, "e")
    assert {run.run_id for run in found.runs} == set(ids[:2])
    said = {out.run_id: out.reason for out in found.left_out}
    for run_id, reason in zip(ids[2:], bad, strict=True):
        assert said[run_id].startswith(reason), (said[run_id], reason)
    assert [out.reason for out in found.left_out if out.name == "begun"] == [
        "no result: waiting, or recorded by another version"
    ]
    assert found.reasons()["no result"] == 1
    assert ids[6] in {run.run_id for run in collect(store, "e", any_code=True).runs}


def test_of_equal_settings_the_most_common_are_kept(store: Store):
    others = [replace(r, code_digest="e" * 64, key=f"{i}") for i, r in enumerate(SMALL[:3])]
    write(store.client, "e", [*others, *SMALL])
    found = collect(store, "e")
    assert (len(found.runs), found.reasons()) == (8, {"other code": 3})


def test_cells_of_the_plan_that_another_experiment_had_done(store: Store):
    write(store.client, "first", SMALL)
    write(store.client, "second", [record("lmu", 10**6, 10**6, 0, 3.0)])
    planned = [{"key": r.key, "name": "cell", "planned_tokens": 1, "n_workers": 1} for r in SMALL[:2]]
    store.write_plan("second", "ladder", [*planned, {**planned[0], "key": "z" * 64}])
    found = collect(store, "second")
    assert {run.record.key for run in found.runs} >= {r.key for r in SMALL[:2]}
    assert len(found.runs) == 3
    assert [out.reason for out in found.left_out] == ["no result: planned, not begun"]


def test_one_rate_for_all_budgets_and_seeds(store: Store):
    cells = [(10**6, 0), (10**6, 1), (10**7, 0), (10**7, 1)]
    good = [record("lmu", 10_000, tokens, seed, 5 - 0.1 * (tokens > 10**6)) for tokens, seed in cells]
    lucky = [
        record("lmu", 10_000, tokens, seed, loss, learning_rate=0.5)
        for (tokens, seed), loss in zip(cells, (4.0, 5.5, 5.5, 5.6), strict=True)
    ]
    retried = record("lmu", 10_000, 10**7, 2, 5.1, learning_rate=0.005, retry_of="k")
    write(store.client, "e", [*good, *lucky, retried])
    found = collect(store, "e")
    assert {run.record.key for run in found.runs} == {r.key for r in [*good, retried]}
    assert found.tries == {"lmu": 2}
    assert found.reasons() == {"not the best settings": 4}


def test_of_two_runs_of_a_cell_elsewhere_the_finished_one_counts(store: Store):
    cell = record("lmu", 10_000, 10**6, 0, 4.0)
    done = write(store.client, "first", [cell])[0]
    experiment_id, study_id = store.open_study("third", "ladder")
    store.create_run(experiment_id, study_id, "later", cell.key, "/nowhere")
    write(store.client, "second", [record("lmu", 10**6, 10**6, 0, 3.0)])
    store.write_plan("second", "ladder", [{"key": cell.key, "name": "cell", "planned_tokens": 1, "n_workers": 1}])
    assert done in {run.run_id for run in collect(store, "second").runs}


def test_nothing_to_report_on(store: Store):
    with pytest.raises(ConfigError, match="no experiment 'none'"):
        collect(store, "none")
    write(store.client, "e", [record("lmu", 10_000, 10**6, 0, 4.0, phase="undecayed")])
    with pytest.raises(ConfigError, match="no finished run to report on: undecayed"):
        collect(store, "e")


def test_the_digest_is_of_the_runs_that_count(store: Store):
    write(store.client, "e", SMALL)
    first = collect(store, "e").digest
    write(store.client, "e", [record("lmu", 10_000, 10**6, 7, 4.0, status="diverged")])
    assert collect(store, "e").digest == first
    write(store.client, "e", [record("lmu", 10_000, 10**6, 7, 4.0)])
    assert collect(store, "e").digest != first


def test_what_is_resampled_together(store: Store):
    def labelled(n_seeds: int) -> set[str]:
        write(store.client, f"e{n_seeds}", study(("lmu",), (10_000, 100_000), (10**6, 10**7), range(n_seeds)))
        return set(labels(collect(store, f"e{n_seeds}").runs))

    assert len(labelled(2)) == 8  # a run each, as trunks are few
    assert len(labelled(10)) == 20  # a size and seed each


def test_runs_csv_has_all(store: Store, tmp_path: Path):
    write(store.client, "e", [*SMALL, record("lmu", 10_000, 10**6, 7, 4.0, status="diverged")])
    found = collect(store, "e")
    write_runs(tmp_path / "runs.csv", found)
    with (tmp_path / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    assert [line["left_out"] for line in lines] == [""] * 8 + ["diverged"]
    assert float(lines[0]["val_loss_nats"]) == found.runs[0].record.val_loss_nats  # to the last digit


def collected_in(store: Store, client: MlflowClient, n_runs: int) -> tuple[Study, float]:
    seeds = range(n_runs // 100)
    made = study(sizes=tuple(int(n) for n in np.logspace(4, 6, 5)), seeds=seeds)[:n_runs]
    write(client, "many", made)
    began = time.monotonic()
    return collect(store, "many"), time.monotonic() - began


def test_hundreds_of_runs_in_a_moment(store: Store):
    found, seconds = collected_in(store, store.client, 200)
    assert len(found.runs) == 200
    assert seconds < 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_runs_in_seconds(store: Store):
    found, seconds = collected_in(store, store.client, 5000)
    assert len(found.runs) == 5000
    assert seconds < 20
    print(f"{seconds:.1f} s")
