"""Reading records of other versions of the code: of schema 1, and of later schemas."""

import gzip
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lmu_dist.cli import main
from lmu_dist.models.shape import Shape
from lmu_dist.records import SCHEMA_VERSION, RunRecord, known_fields
from lmu_dist.scaling.collect import collect
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.runs import runs_of
from lmu_dist.tracking.store import Store

# Written by the last commit before schema 2 (`lmu-dist ladder`, two families, two sizes, two budgets, experiment "before");
# paths in them were changed.
OLD = Path(__file__).parent / "records"


@pytest.fixture
def old_store(tmp_path: Path) -> Store:
    with gzip.open(OLD / "schema-1-mlflow.db.gz") as packed, (tmp_path / "mlflow.db").open("wb") as file:
        shutil.copyfileobj(packed, file)
    return Store(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_epochs_are_tokens_over_unique_tokens():
    record = RunRecord(family="lmu", n_params=5, tokens=300)
    assert math.isnan(record.epochs)
    assert not record.repeats_data
    assert replace(record, unique_tokens=200).epochs == 1.5
    assert replace(record, unique_tokens=200).repeats_data
    assert not replace(record, unique_tokens=299).repeats_data  # rounded up to whole batches


def test_reads_a_record_of_schema_1():
    stored = json.loads((OLD / "schema-1-record.json").read_text())
    record = RunRecord.from_json(stored)
    assert (record.family, record.n_params, record.planned_tokens, record.fork_step) == ("lmu", 3026, 5120, 8)
    assert (record.schema_version, record.family_version, record.train_version) == (1, "", 0)
    assert record.versions == (stored["code_digest"][:12],) * 2
    assert stored.items() <= record.to_json().items()


def test_unknown_field_of_a_later_schema_is_kept_and_ignored():
    record = RunRecord(family="lmu", n_params=5, schema_version=SCHEMA_VERSION)
    later = record.to_json() | {"schema_version": 99, "carbon_grams": 1.5}
    read = RunRecord.from_json(json.loads(json.dumps(later)))
    assert read.unknown == {"carbon_grams": 1.5}
    assert read.to_json()["carbon_grams"] == 1.5
    assert repr(replace(read, unknown={}, schema_version=SCHEMA_VERSION)) == repr(record)


def test_epochs_are_a_metric_that_queries_can_compare():
    record = RunRecord(family="lmu", n_params=5, tokens=3000, unique_tokens=2000)
    assert record.columns("metrics")["final/epochs"] == 1.5
    assert record.repeats_data
    assert "epochs" not in record.to_json()  # it follows from the others
    assert "final/epochs" not in replace(record, unique_tokens=0).columns("metrics")  # an older record


def test_run_without_results_has_no_record():
    record = RunRecord(family="lmu", n_params=5, tokens=7, val_loss_nats=4.0, key="k", status="complete", phase="decayed")
    params = {name: str(value) for name, value in record.columns("params").items()}
    tags = {name: str(value) for name, value in record.columns("tags").items()}
    assert RunRecord.from_columns(params, record.columns("metrics"), tags).val_loss_nats == 4.0
    with pytest.raises(KeyError, match="val_loss_nats"):
        RunRecord.from_columns(params, {}, tags)


def test_status_and_report_read_a_store_of_schema_1(old_store: Store, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", old_store.uri)
    monkeypatch.chdir(tmp_path)
    assert [row.state for row in rows(old_store, "before")] == ["complete"] * 8
    study = collect(old_store, "before")
    assert (len(study.runs), study.families, study.left_out) == (8, ("lmu", "transformer"), ())
    assert study.appearances["lmu"].title == "LMU"
    digest = study.runs[0].record.code_digest[:12]
    assert study.versions == f"lmu {digest}, transformer {digest}, training {digest}"
    assert main(["status", "before", "--once"]) == 0
    assert "8 of 8 cells ended" in capfd.readouterr().out


def test_runs_of_schema_1_meet_no_others_in_a_fit(old_store: Store):
    run = runs_of(old_store, "before")[0]
    for _ in range(9):  # more than the old ones
        experiment_id = run.info.experiment_id
        made = old_store.client.create_run(experiment_id, tags=dict(run.data.tags))
        for name, value in (run.data.params | {"train_version": "1", "family_version": "1"}).items():
            old_store.client.log_param(made.info.run_id, name, value)
        for name, value in run.data.metrics.items():
            old_store.client.log_metric(made.info.run_id, name, value)
    study = collect(old_store, "before")
    assert {run.record.train_version for run in study.runs} == {1}
    assert study.left_out_counts()["other training version"] == 8


def test_reads_a_shape_of_schema_1():
    old = {"family": "lmu", "d_model": 11, "n_blocks": 2, "sequence_tokens": 32, "vocab_tokens": 300, "d_ff": 32, "n_heads": 0}
    old |= {"d_hidden": 0, "order": 10, "reduced_order": 1, "theta_tokens": 32}
    shape = Shape.from_dict(old)
    assert (shape.d_ff, shape.order, shape.theta_tokens) == (32, 10, 32)
    assert Shape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape
    with pytest.raises(AttributeError, match="'lmu' has no width 'n_heads'"):
        _ = shape.n_heads


def test_known_fields_leaves_out_unknown_entries():
    @dataclass
    class Stored:
        a: int
        b: int = 2

    assert Stored(**known_fields(Stored, {"a": 1, "c": 3})) == Stored(1, 2)
