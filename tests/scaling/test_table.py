"""Reading CSV tables: rows, conditions, rows left out, and one clear error line for anything invalid."""

import random
from pathlib import Path

import numpy as np
import pytest

from lmu_dist.config import ConfigError
from lmu_dist.scaling.read_table import MAX_ROWS, read_table
from lmu_dist.scaling.table import rows_from_columns, size_bins

HEADER = "N,D,loss,data\n"


def table(tmp_path: Path, text: str, where: tuple[str, ...] = ()):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    read = read_table(path, "N", "D", "loss", where)
    return read.rows, read.numbers, read.left_out


def test_rows_are_read_unchanged(tmp_path: Path):
    rows, numbers, left_out = table(tmp_path, "\ufeff" + HEADER + "1e6, 2e8,3.5,a\n\n1000000,3e8, 3.4 ,b\n")
    assert (list(rows.n_params), list(rows.tokens), list(rows.loss)) == ([1e6, 1e6], [2e8, 3e8], [3.5, 3.4])
    assert (numbers, left_out) == ((1, 2), [])


def test_rows_without_a_loss_are_left_out_and_listed(tmp_path: Path):
    _, numbers, left_out = table(tmp_path, HEADER + "1,1,nan,a\n1,1,3,a\n1,1,,a\n1,1,inf,a\n1,1,NA,a\n")
    assert numbers == (2,)
    assert [(out.reason, out.rows) for out in left_out] == [("loss is missing or not finite", (1, 3, 4, 5))]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (("data=a",), (1, 2)),
        (("data=a", "data=b"), (1, 2, 3)),
        (("data=a", "N>1"), (2,)),
        (("N!=1",), (2, 3, 4)),
        (("N<=2.0", "D>=3"), (3,)),
        (("data=",), (4,)),
        (("N=2",), (2, 3)),
    ],
    ids=["equal", "any of", "and", "not", "both bounds", "empty", "as numbers"],
)
def test_conditions(tmp_path: Path, where: tuple[str, ...], kept: tuple[int, ...]):
    _, numbers, left_out = table(tmp_path, HEADER + "1,1,3,a\n2,2,3,a\n2,3,3,b\n3,4,3,\n", where)
    assert numbers == kept
    assert sum(len(out.rows) for out in left_out) == 4 - len(kept)


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", (), "is empty"),
        (HEADER, (), "has a header but no rows"),
        ("N,D\n1,1\n", (), "no column 'loss'; its columns are: N, D"),
        ("N,N,D,loss\n1,1,1,1\n", (), "two columns have the same name"),
        (HEADER + "1,-5,3,a\n", (), "row 1, column 'D': '-5'; it must be positive"),
        (HEADER + "1,0,3,a\n", (), "must be positive"),
        (HEADER + "inf,1,3,a\n", (), "must be positive and finite"),
        (HEADER + "1,1,-3,a\n", (), "column 'loss': '-3'; it must be positive"),
        (HEADER + "1,1,low,a\n", (), "row 1, column 'loss': 'low' is not a number"),
        (HEADER + "many,1,3,a\n", (), "'many' is not a number"),
        (HEADER + "1,1,3,4,5\n", (), "row 1 has 5 cells, the header 4"),
        (HEADER + "1,1,nan,a\n", (), "no row of 1 can be used"),
        (HEADER + "1,1,3,a\n", ("data=b",), "no row of 1 can be used"),
        (HEADER + "1,1,3,a\n", ("data",), "is not a condition"),
        (HEADER + "1,1,3,a\n", ("colour=a",), "no column 'colour'"),
        (HEADER + "1,1,3,a\n", ("N>a",), "'a' is not a number"),
    ],
)
def test_invalid_tables_and_conditions(tmp_path: Path, text: str, where: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        table(tmp_path, text, where)


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_table(tmp_path / "none.csv", "N", "D", "loss")
    with pytest.raises(ConfigError, match="is not a CSV text file"):
        read_table(tmp_path, "N", "D", "loss")
    (tmp_path / "b.csv").write_bytes(b"N,D,loss\n\xff\xfe\x00,1,1\n")
    with pytest.raises(ConfigError, match="is not a CSV text file"):
        read_table(tmp_path / "b.csv", "N", "D", "loss")


def test_tables_of_training_curves_are_refused(tmp_path: Path):
    lines = (f"{random.choice((1e6, 1e7))},{i + 1},{3 + 1 / (i + 1)},a" for i in range(MAX_ROWS + 1))
    with pytest.raises(ConfigError, match="not independent"):
        table(tmp_path, HEADER + "\n".join(lines))


def test_size_bins_group_similar_sizes():
    values = np.array([7990.0, 40000.0, 8010.0, 39000.0, 8000.0])
    assert list(size_bins(values)) == [7990, 39000, 7990, 39000, 7990]
    dense = np.geomspace(1e6, 1e9, 500)  # steps of 1.4 %: neighbours are similar, the ends are not
    assert 100 < len(set(size_bins(dense))) < 150


def test_equal_rows_and_rows_of_one_run_are_one_group():
    n, d, loss = [1.0, 1, 2, 2, 3, 1], [1.0] * 6, [3.0, 3, 2, 2.5, 1, 3]
    assert rows_from_columns(n, d, loss).duplicate_groups() == ["0", "0", "2", "3", "4", "0"]
    rows = rows_from_columns(n, d, loss, run=["a", "b", "c", "c", "d", "d"])
    assert rows.duplicate_groups() == ["0", "0", "2", "2", "0", "0"]  # the last row equals the first and is of the fifth's run
    selected = rows.where(np.array([True, False, True, True, False, False]))
    assert (selected.run, selected.duplicate_groups()) == (("a", "c", "c"), ["0", "1", "1"])


def test_rows_that_differ_in_unique_tokens_are_not_equal():
    rows = rows_from_columns([1, 1, 1], [2, 2, 2], [3, 3, 3], unique_tokens=[2, 1, 2])
    assert rows.duplicate_groups() == ["0", "1", "0"]
    kept = rows.where(np.array([False, True, True]))
    assert kept.unique_tokens is not None
    assert list(kept.unique_tokens) == [1, 2]
    with pytest.raises(ValueError, match="positive"):
        rows_from_columns([1], [2], [3], unique_tokens=[0])
