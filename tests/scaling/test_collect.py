"""Collecting a study from MLflow: which runs are used, which are left out and why, and how long it takes."""

import csv
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from simulate import make_record, simulate_study, write_runs_to_mlflow

from lmu_dist.config import ConfigError
from lmu_dist.scaling.collect import Study, collect, resampling_groups, rows_from_runs
from lmu_dist.scaling.run_csv import write_run_csv
from lmu_dist.scaling.settings import settings_of
from lmu_dist.tracking.new_run import create_run
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.stored_runs import read_runs
from lmu_dist.tracking.studies import open_study, write_plan


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(default_uri(tmp_path))


SMALL_STUDY = simulate_study(families=("lmu", "transformer"), sizes=(10_000, 100_000), budgets=(10**6, 10**7))


def test_collect_returns_the_recorded_runs(store: Store):
    ids = write_runs_to_mlflow(store.client, "e", SMALL_STUDY)
    found = collect(store, "e")
    assert {run.run_id: run.record for run in found.runs} == dict(zip(ids, SMALL_STUDY, strict=True))
    assert (found.families, found.size_bins, found.left_out) == (("lmu", "transformer"), (10_000, 100_000), ())
    assert found.source == "simulation"
    table = rows_from_runs(found.runs_of("lmu"))
    assert list(table.loss) == [r.val_loss_nats for r in SMALL_STUDY if r.family == "lmu"]
    assert list(rows_from_runs(found.runs_of("lmu"), with_head=True).n_params) == [
        r.n_params_with_head for r in SMALL_STUDY if r.family == "lmu"
    ]


def test_budgets_whose_rate_follows_from_one_rule_have_the_same_settings():
    def settings(rate: float, at_reference: float, exponent: float, **change: object) -> object:
        params = {"train.learning_rate": at_reference, "train.rate_token_exponent": exponent, "train.rate_at_tokens": 10**6}
        params = {key: str(value) for key, value in (params | {"train.earlier_tokens": [10**6]}).items()}
        record = make_record("lmu", 10_000, 4 * 10**6, 0, 4.0)
        return settings_of(replace(record, learning_rate=rate, **change), params)  # pyright: ignore[reportArgumentType]

    assert settings(0.01, 0.01, -0.5) == settings(0.005, 0.01, -0.5)
    assert settings(0.005, 0.005, -0.5, retry_of="k") == settings(0.005, 0.01, -0.5)
    assert settings(0.005, 0.01, -0.5) != settings(0.005, 0.02, -0.5)
    assert settings(0.01, 0.01, -0.5) != settings(0.01, 0.01, -1.0)


def test_sizes_within_five_percent_share_a_size_bin(store: Store):
    write_runs_to_mlflow(
        store.client, "e", [make_record("lmu", 10_120, 10**6, 0, 4.0), make_record("transformer", 9_990, 10**6, 0, 4.2)]
    )
    assert collect(store, "e").size_bins == (9_990,)


def test_unusable_runs_are_left_out_with_the_reason(store: Store):
    good = make_record("lmu", 10_000, 10**6, 0, 4.0)
    bad = {
        "undecayed": {"phase": "undecayed", "seed": 1},
        "stopped early: asha at step 7": {"status": "stopped_early", "stop_rule": "asha at step 7", "seed": 2},
        "diverged": {"status": "diverged", "seed": 3},
        "other data": {"data_digest": "e" * 64, "seed": 4},
        "other training version": {"code_digest": "e" * 64, "seed": 5},
        "other sequence length": {"sequence_tokens": 64, "seed": 6},
        "not the best settings: learning rate 0.5": {"learning_rate": 0.5, "val_loss_nats": 4.5},
        "no valid loss": {"val_loss_nats": float("nan"), "seed": 8},
    }
    records = [good, make_record("transformer", 10_000, 10**6, 0, 4.2)]
    records += [replace(good, **changes, key=reason) for reason, changes in bad.items()]
    ids = write_runs_to_mlflow(store.client, "e", records)
    experiment_id, study_id = open_study(store, "e", "ladder")
    create_run(store, experiment_id, study_id, "started", "k" * 64, "/nowhere")
    found = collect(store, "e")
    assert {run.run_id for run in found.runs} == set(ids[:2])
    reasons = {out.run_id: out.reason for out in found.left_out}
    for run_id, reason in zip(ids[2:], bad, strict=True):
        assert reasons[run_id].startswith(reason), (reasons[run_id], reason)
    assert [out.reason for out in found.left_out if out.name == "started"] == [
        "no result: waiting, or recorded by another version of lmu-dist"
    ]
    assert found.left_out_counts()["no result"] == 1
    assert ids[6] in {run.run_id for run in collect(store, "e", any_code=True).runs}


def test_runs_with_the_most_common_code_are_kept(store: Store):
    others = [replace(r, code_digest="e" * 64, key=f"{i}") for i, r in enumerate(SMALL_STUDY[:3])]
    write_runs_to_mlflow(store.client, "e", [*others, *SMALL_STUDY])
    found = collect(store, "e")
    assert (len(found.runs), found.left_out_counts()) == (8, {"other training version": 3})


def test_planned_cells_of_another_experiment_are_included(store: Store):
    write_runs_to_mlflow(store.client, "first", SMALL_STUDY)
    write_runs_to_mlflow(store.client, "second", [make_record("lmu", 10**6, 10**6, 0, 3.0)])
    planned = [{"key": r.key, "name": "cell", "planned_tokens": 1, "n_workers": 1} for r in SMALL_STUDY[:2]]
    write_plan(store, "second", "ladder", [*planned, {**planned[0], "key": "z" * 64}])
    found = collect(store, "second")
    assert {run.record.key for run in found.runs} >= {r.key for r in SMALL_STUDY[:2]}
    assert len(found.runs) == 3
    assert [out.reason for out in found.left_out] == ["no result: planned, not started"]


def test_the_best_settings_hold_for_all_budgets_and_seeds(store: Store):
    cells = [(10**6, 0), (10**6, 1), (10**7, 0), (10**7, 1)]
    good = [make_record("lmu", 10_000, tokens, seed, 5 - 0.1 * (tokens > 10**6)) for tokens, seed in cells]
    lucky = [
        make_record("lmu", 10_000, tokens, seed, loss, learning_rate=0.5)
        for (tokens, seed), loss in zip(cells, (4.0, 5.5, 5.5, 5.6), strict=True)
    ]
    retried = make_record("lmu", 10_000, 10**7, 2, 5.1, learning_rate=0.005, retry_of="k")
    write_runs_to_mlflow(store.client, "e", [*good, *lucky, retried])
    found = collect(store, "e")
    assert {run.record.key for run in found.runs} == {r.key for r in [*good, retried]}
    assert found.n_settings_tried == {"lmu": 2}
    assert found.left_out_counts() == {"not the best settings": 4}


def test_grids_of_other_settings_are_not_mixed(store: Store):
    """Of two grids that differ in weight decay, a fit takes one, not the luckiest cells of both."""
    cells = ((10**6, 4.0, 4.5), (10**7, 3.9, 3.5))
    first = [make_record("lmu", 10_000, tokens, 0, loss) for tokens, loss, _ in cells]
    second = [make_record("lmu", 10_000, tokens, 0, loss, key=f"second{tokens}") for tokens, _, loss in cells]
    ids = write_runs_to_mlflow(store.client, "e", second, settings={"train.weight_decay": 0.1})
    write_runs_to_mlflow(store.client, "e", first)
    found = collect(store, "e")
    assert [run.run_id for run in found.runs] == ids  # the best at the largest budget
    assert [out.reason for out in found.left_out] == ["not the best settings: weight decay 0 (best 0.1)"] * 2
    assert found.n_settings_tried == {"lmu": 2}


@pytest.mark.parametrize(
    ("key", "usual", "other"),
    [
        ("train.weight_decay", 0.0, 0.1),
        ("train.beta1", 0.9, 0.95),
        ("train.beta2", 0.999, 0.95),
        ("train.eps", 1e-8, 1e-6),
        ("train.clip_norm", 1.0, 0.0),
        ("train.warmup_tokens", 125_000, 0),
        ("train.decay_share", 0.2, 0.5),
        ("train.plateau_patience", 0, 3),
        ("train.eval_tokens", 262_144, 1024),
        ("model.theta_tokens", None, 64),
        ("model.order", None, 20),
        ("model.base_n_params", None, 1000),
    ],
)
def test_all_that_can_be_tuned_is_a_setting(key: str, usual: object, other: object):
    record = make_record("lmu", 10_000, 10**6, 0, 4.0)
    of_a_version_without_the_key = settings_of(record, {})
    assert settings_of(record, {key: str(usual)}) == of_a_version_without_the_key
    assert settings_of(record, {key: str(other)}) != of_a_version_without_the_key


def test_other_fields_of_records_are_settings_too():
    record = make_record("lmu", 10_000, 10**6, 0, 4.0)
    for change in (
        {"learning_rate": 0.1},
        {"batch_tokens": 2048},
        {"schedule": "cosine"},
        {"precision": "bf16"},
        {"n_blocks": 3},
    ):
        assert settings_of(replace(record, **change), {}) != settings_of(record, {})
    assert settings_of(replace(record, learning_rate=0.005, retry_of="k"), {}) == settings_of(record, {})


def test_settings_without_effect_are_no_settings():
    record = make_record("lmu", 10_000, 10**6, 0, 4.0, schedule="cosine")
    for params in (
        {"train.decay_share": "0.5", "train.eval_every_tokens": "7", "train.divergence_factor": "3.0", "train.tokens": "1"},
        {"model.form": "fft", "train.gradient_precision": "bf16", "train.plateau_factor": "0.1", "data.source": "files"},
        {"train.log_every_steps": "7"},
        {"model.n_params": "10000", "model.base_n_params": "10000"},
    ):
        assert settings_of(record, params) == settings_of(record, {})


def test_models_of_other_widths_are_other_settings(store: Store):
    """Widths that follow from another rule, or were tuned, are not one size in a fit; N then differs a little."""
    small = [make_record("lmu", 9_990, 10**6, s, 4.0, widths='{"order": 20}', key=f"small{s}") for s in range(2)]
    large = [make_record("lmu", 10_050, 10**6, s, 4.2, widths='{"order": 40}', key=f"large{s}") for s in range(2)]
    older = make_record("lmu", 9_990, 10**6, 2, 4.1)  # its widths were not recorded
    write_runs_to_mlflow(store.client, "e", [*large, *small, older], settings={"model.n_params": 10_000})
    found = collect(store, "e")
    assert {run.record.seed for run in found.runs} == {0, 1, 2}
    assert {run.record.widths for run in found.runs} == {'{"order": 20}', ""}
    assert [out.reason for out in found.left_out] == ["not the best settings: order 40 (best 20)"] * 2


def test_losses_over_other_rows_are_not_compared(store: Store):
    record = make_record("lmu", 10_000, 10**6, 0, 4.0)
    spread = [replace(record, seed=s, key=f"{s}", validation_rows="64 of 100") for s in (1, 2)]
    write_runs_to_mlflow(store.client, "e", [record, *spread])
    found = collect(store, "e")
    assert {run.record.seed for run in found.runs} == {1, 2}
    assert found.left_out_counts() == {"other rows of the validation split": 1}


def test_bf16_sums_of_gradients_are_another_setting(store: Store):
    """An older bf16 run, whose record does not name them, is not fitted together with one that has float32 sums."""
    in_bf16 = [
        make_record("lmu", 10_000, 10**6, seed, 4.6, precision="bf16", gradient_precision=p)
        for seed, p in ((0, ""), (1, "bf16"))
    ]
    in_fp32 = make_record("lmu", 10_000, 10**6, 2, 4.5, precision="bf16", gradient_precision="fp32")
    write_runs_to_mlflow(store.client, "e", [*in_bf16, in_fp32])
    found = collect(store, "e")
    assert [run.record.seed for run in found.runs] == [2]
    assert found.left_out_counts() == {"not the best settings": 2}


def test_the_finished_one_of_two_runs_of_a_cell_is_used(store: Store):
    cell = make_record("lmu", 10_000, 10**6, 0, 4.0)
    done = write_runs_to_mlflow(store.client, "first", [cell])[0]
    experiment_id, study_id = open_study(store, "third", "ladder")
    create_run(store, experiment_id, study_id, "later", cell.key, "/nowhere")
    write_runs_to_mlflow(store.client, "second", [make_record("lmu", 10**6, 10**6, 0, 3.0)])
    write_plan(store, "second", "ladder", [{"key": cell.key, "name": "cell", "planned_tokens": 1, "n_workers": 1}])
    assert done in {run.run_id for run in collect(store, "second").runs}


def test_an_experiment_without_usable_runs_is_an_error(store: Store):
    with pytest.raises(ConfigError, match="no experiment 'none'"):
        collect(store, "none")
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 0, 4.0, phase="undecayed")])
    with pytest.raises(ConfigError, match="no finished run to report on: undecayed"):
        collect(store, "e")


def test_the_digest_depends_on_used_runs_only(store: Store):
    write_runs_to_mlflow(store.client, "e", SMALL_STUDY)
    first = collect(store, "e").digest
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 7, 4.0, status="diverged")])
    assert collect(store, "e").digest == first
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 7, 4.0)])
    assert collect(store, "e").digest != first


def test_resampling_groups(store: Store):
    def groups_of(n_seeds: int) -> set[str]:
        write_runs_to_mlflow(
            store.client, f"e{n_seeds}", simulate_study(("lmu",), (10_000, 100_000), (10**6, 10**7), range(n_seeds))
        )
        return set(resampling_groups(collect(store, f"e{n_seeds}").runs))

    assert len(groups_of(2)) == 4  # two sizes and two seeds


def test_runs_csv_has_all_runs(store: Store, tmp_path: Path):
    write_runs_to_mlflow(store.client, "e", [*SMALL_STUDY, make_record("lmu", 10_000, 10**6, 7, 4.0, status="diverged")])
    found = collect(store, "e")
    write_run_csv(tmp_path / "runs.csv", found, read_runs(store, "e"))
    with (tmp_path / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    assert [line["left_out"] for line in lines] == [""] * 8 + ["diverged"]
    assert float(lines[0]["val_loss_nats"]) == found.runs[0].record.val_loss_nats  # to the last digit


def time_collect(store: Store, client: MlflowClient, n_runs: int) -> tuple[Study, float]:
    seeds = range(n_runs // 100)
    records = simulate_study(sizes=tuple(int(n) for n in np.logspace(4, 6, 5)), seeds=seeds)[:n_runs]
    write_runs_to_mlflow(client, "many", records)
    started_at = time.process_time()
    return collect(store, "many"), time.process_time() - started_at


def test_collecting_hundreds_of_runs_is_fast(store: Store):
    found, seconds = time_collect(store, store.client, 200)
    assert len(found.runs) == 200
    assert seconds < 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_collecting_thousands_of_runs_takes_seconds(store: Store):
    found, seconds = time_collect(store, store.client, 5000)
    assert len(found.runs) == 5000
    assert seconds < 20
    print(f"{seconds:.1f} s")
