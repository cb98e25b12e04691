"""The laws that the runs of one family support: runs in, a `LawComparison` out. For results and for forecasts of cells."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmu_dist.scaling.collect import Run, resampling_groups, rows_from_runs
from lmu_dist.scaling.compare_laws import LawComparison, compare_laws, repeats_data
from lmu_dist.scaling.diagnostics import check_table
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.table import Rows


def rows_with_unique_tokens(runs: Sequence[Run]) -> Rows:
    """Returns the runs as a table; with the unique tokens of each if all are known and some runs repeat their data."""
    rows, unique = rows_from_runs(runs), np.array([run.record.unique_tokens for run in runs], np.float64)
    with_unique = replace(rows, unique_tokens=unique)
    return with_unique if most_unique_tokens(runs) is not None and repeats_data(with_unique) else rows


def most_unique_tokens(runs: Sequence[Run]) -> float | None:
    """Returns the unique tokens of the runs' data, the most of any run; None if a record, of an older version, has none."""
    unique = [run.record.unique_tokens for run in runs]
    return float(max(unique)) if unique and all(unique) else None


def compare_family_laws(runs: Sequence[Run]) -> LawComparison:
    """Returns all laws fitted to the runs of a family, with their errors on held-out runs, and which ones the runs support."""
    names = [run.name or run.run_id for run in runs]
    return compare_laws(rows_with_unique_tokens(runs), labels=resampling_groups(runs), names=names)


def missing_runs(runs: Sequence[Run]) -> list[str]:
    """Returns why the runs are too few to tell laws apart; empty if they are not.

    A law with fewer parameters may be fitted to them all the same, but nothing would show that it is the wrong one.
    """
    return check_table(Chinchilla, rows_from_runs(runs))
