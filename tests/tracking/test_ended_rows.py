"""`lmu-dist status` reads a run that has ended once; whatever changes later is seen."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lmu_dist import show
from lmu_dist.show import runs, tables
from lmu_dist.tracking import ended_rows
from lmu_dist.tracking.ended_rows import Row
from lmu_dist.tracking.new_run import create_run
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.runs import retire_run, runs_of
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import open_study, write_plan

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def store(tmp_path: Path, machine: Callable[[str], None]) -> Store:
    return Store(default_uri(tmp_path))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the runs that MLflow has returned."""
    keys, original = list[str](), MlflowClient.search_runs

    def search(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        keys.extend(run.data.tags["lmu.key"] for run in found if "lmu.key" in run.data.tags)
        return found

    monkeypatch.setattr(MlflowClient, "search_runs", search)
    return keys


def make(store: Store, key: str, status: str = "complete") -> str:
    experiment_id, study_id = open_study(store, "e", "ladder")
    run_id = create_run(store, experiment_id, study_id, f"cell-{key}", key, f"/runs/{key}")
    store.client.set_tag(run_id, "lmu.status", status)
    if status == "complete":
        store.client.set_terminated(run_id)
    return run_id


def states(store: Store) -> dict[str, str]:
    return {row.key: row.state for row in rows(store, "e")}


def test_ended_runs_are_read_once(store: Store, read: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ended_rows, "PAGE_RUNS", 2)
    for key in "abcdef":
        make(store, key)
    running = make(store, "r", "running")
    expected = dict.fromkeys("abcdef", "complete") | {"r": "running"}
    assert states(store) == expected
    assert sorted(read) == [*"abcdef", "r"]
    read.clear()
    assert states(store) == expected
    assert (read.count("r"), len(read)) == (1, 3)  # and a page of the runs that ended last
    store.client.set_tag(running, "lmu.status", "complete")
    store.client.set_terminated(running)
    make(store, "g")
    make(store, "h")
    assert states(store) == dict.fromkeys("abcdefghr", "complete")


def test_runs_that_are_deleted_retired_restored_or_continued_are_seen(store: Store):
    run_ids = {key: make(store, key) for key in "abc"}
    assert states(store) == dict.fromkeys("abc", "complete")
    store.client.delete_run(run_ids["a"])
    retire_run(store, run_ids["b"])
    assert states(store) == {"c": "complete"}
    store.client.restore_run(run_ids["a"])
    assert states(store) == {"a": "complete", "c": "complete"}
    store.client.set_tag(run_ids["c"], "lmu.status", "running")
    assert states(store) == {"a": "complete", "c": "running"}
    store.client.set_tag(run_ids["c"], "lmu.status", "complete")
    assert states(store) == {"a": "complete", "c": "complete"}


def test_rows_are_read_again_if_the_file_is_old_or_damaged(store: Store, read: list[str]):
    make(store, "a")
    found = store.client.get_experiment_by_name("e")
    assert found is not None
    path = ended_rows._path(store, found)
    ended_rows.keep_rows(store, "e", runs_of(store, "e"))
    assert path.exists()
    kept = path.read_text()
    for spoil in (lambda: path.write_text(kept[:-1]), lambda: path.write_text("[]"), lambda: os.utime(path, (0, 0))):
        spoil()
        assert states(store) == {"a": "complete"}
        path.write_text(kept.replace("cell-a", "kept"))
        assert [row.name for row in rows(store, "e")] == ["kept"]


def test_planned_cells_are_looked_for_in_other_experiments_only(store: Store, read: list[str]):
    make(store, "a")
    other_id = store.client.create_experiment("other")
    create_run(store, other_id, "", "cell-b", "b", "/runs/b")
    write_plan(store, "e", "ladder", [{"name": k, "key": k, "planned_tokens": 1, "n_workers": 1} for k in "abc"])
    read.clear()
    assert {row.key: (row.state, row.remark) for row in rows(store, "e")} == {
        "a": ("complete", ""),
        "b": ("waiting", "in another experiment"),
        "c": ("planned", ""),
    }
    assert sorted(read) == ["a", "b"]


def test_long_tables_are_printed_plainly_and_cut_on_a_screen(capsys: pytest.CaptureFixture[str]):
    cells = [Row(f"cell-{i}", str(i), "", "complete", 10, 10, 5.0, None, 1, 1, None, "") for i in range(tables.LONG + 1)]
    show.print_status(lambda: cells, live=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["cell", "state", "tokens", "of", "loss", "tokens/s", "workers", "attempts", "ETA", "remark"]
    assert lines[-2].split() == [f"cell-{tables.LONG}", "complete", "10", "10", "5.0000", "1", "1"]
    assert lines[-1] == f"{len(cells)} of {len(cells)} cells ended"
    assert len(lines) == len(cells) + 2
    table = runs._status_table(cells, 20)
    assert table.row_count == 20
    assert table.caption == f"{len(cells)} of {len(cells)} cells ended; {len(cells) - 20} more cells: --once prints all"
