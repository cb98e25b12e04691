"""Looks for rows that are not what a fit takes them for: a table in, reasons and warnings with their rows out.

A reason means that a law fitted to the table would be wrong; a warning that the fit goes on, and in what way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.misfit import SAME_POINT_SPREAD, repeated_points
from lmu_dist.scaling.table import Rows

FAR_APART = 0.03  # in ln L, of runs with the same N and D; seeds differ by less than 0.01
UNIT_GAP = 100.0  # from one size to the next larger one
TOKENS_PER_PARAMETER = (0.05, 3000.0)  # outside of this a gap is more likely another unit
LIKELY_TOKENS_PER_PARAMETER = (0.01, 1e5)
MIN_LOGGED_STEPS = 8  # rows of one size that are equally spaced in D
MIN_RUNS = 10  # of Chinchilla's law
EQUAL_SPACING = 0.02  # largest relative deviation of a step between them
MAX_MEDIAN_LOSS = 12.0  # nats: ln of a vocabulary of 160,000 tokens
SHOWN_ROWS = 6


@dataclass(frozen=True)
class TableChecks:
    """What is wrong with a table. `labels`: rows with the same one count as one run."""

    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    labels: tuple[str, ...]


def check_rows(rows: Rows, names: Sequence[str], labels: Sequence[str] | None = None) -> TableChecks:
    """Checks the rows of a table. `names` has what messages call each row, `labels` groups that are known already.

    Rows with labels are the runs of a study, whose columns, units and settings are known: only a few far apart are noticed.
    """
    if labels is not None:
        return TableChecks((), tuple(_far_apart(rows, names)[1]), tuple(labels))
    found, copied = independent_groups(rows)
    warnings = list[str]()
    if len(copied):
        alike = "copies or near copies of others (same N and D, and a loss within 0.01 %) and count as one run with them"
        warnings.append(f"{_rows(copied, names)} {'are' if len(copied) > 1 else 'is'} {alike}")
    if rows.run is not None and (n_runs := len(set(found))) < len(rows):
        warnings.append(f"{len(rows):,} rows of {n_runs:,} runs: rows of one run are resampled together")
    step_reasons, step_warnings = _logged_steps(rows, names)
    reasons, warnings = [*_other_units(rows, names), *step_reasons, *_perplexity(rows)], [*warnings, *step_warnings]
    far_reasons, far_warnings = _far_apart(rows, names)
    ratio = float(np.median(rows.tokens / rows.n_params)) if len(rows) else 1.0
    if not reasons and not LIKELY_TOKENS_PER_PARAMETER[0] < ratio < LIKELY_TOKENS_PER_PARAMETER[1]:
        warnings.append(f"the median run has {ratio:.2g} tokens per parameter: N and D may be in different units")
    return TableChecks((*reasons, *far_reasons), (*warnings, *far_warnings), tuple(found))


def independent_groups(rows: Rows) -> tuple[list[str], list[int]]:
    """Returns a label per row, the same for rows that are one run, and the rows that are copies of earlier ones.

    Runs of the same N and D with nearly the same loss are one run if that happens at most points which several rows have:
    seeds meet so closely only by chance.
    """
    labels = rows.duplicate_groups()
    points = repeated_points(rows)
    close = list[list[int]]()
    for point in points:
        order = sorted(point, key=lambda i: rows.loss[i])
        cluster = [order[0]]
        for before, i in pairwise(order):
            if np.log(rows.loss[i] / rows.loss[before]) < SAME_POINT_SPREAD:
                cluster.append(i)
            else:
                close.append(cluster)
                cluster = [i]
        close.append(cluster)
    close = [sorted(cluster) for cluster in close if len(cluster) > 1]
    equal = [i for i, label in enumerate(labels) if label != str(i) and rows.run is None]
    if len(close) <= max(2, len(points) / 2):
        return labels, equal
    merged = dict[str, str]()
    for cluster in close:
        for i in cluster:
            merged.setdefault(labels[i], labels[cluster[0]])
    copies = [i for cluster in close for i in cluster[1:]]
    return [merged.get(label, label) for label in labels], sorted(copies)


def _rows(which: Sequence[int] | NDArray[np.intp], names: Sequence[str]) -> str:
    """Returns 'row 3' or 'rows 3, 5, 7, ... (12 rows)'."""
    shown = [names[i] for i in which[:SHOWN_ROWS]]
    if len(which) == 1:
        return f"row {shown[0]}"
    more = f", ... ({len(which):,} rows)" if len(which) > SHOWN_ROWS else ""
    return f"rows {', '.join(shown)}{more}"


def _other_units(rows: Rows, names: Sequence[str]) -> list[str]:
    """Finds values that are far from all others and imply an implausible number of tokens per parameter."""
    reasons, ratio = list[str](), rows.tokens / rows.n_params
    for column, values in (("N", rows.n_params), ("D", rows.tokens)):
        distinct = np.unique(values)
        gaps = np.flatnonzero(distinct[1:] / distinct[:-1] >= UNIT_GAP)
        for gap in gaps:
            low, high = np.flatnonzero(values <= distinct[gap]), np.flatnonzero(values > distinct[gap])
            few = low if len(low) <= len(high) else high
            if TOKENS_PER_PARAMETER[0] <= float(np.median(ratio[few])) <= TOKENS_PER_PARAMETER[1]:
                continue
            factor = distinct[gap + 1] / distinct[gap]
            reasons.append(
                f"{column} seems to be in another unit in {_rows(few, names)}: {column} = {_some(values[few])}, a factor of "
                f"{factor:,.0f} from the next value; correct these rows, or exclude them by --where"
            )
    return reasons


def _some(values: Floats) -> str:
    distinct = np.unique(values)
    return ", ".join(f"{value:,.6g}" for value in distinct[:3]) + (", ..." if len(distinct) > 3 else "")


def _logged_steps(rows: Rows, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Finds sizes whose rows are equally spaced in D, as logged steps of one training run are; returns (reasons, warnings).

    Decays from one trunk may be spaced so, too. It is a reason if the table would then have too few runs.
    """
    if rows.run is not None:
        return [], []
    found, n_runs = list[int](), 0
    for size in np.unique(rows.n_params):
        which = np.flatnonzero(rows.n_params == size)
        steps = np.diff(np.unique(rows.tokens[which]))
        if len(steps) + 1 >= MIN_LOGGED_STEPS and np.ptp(steps) <= EQUAL_SPACING * steps.mean():
            found += which.tolist()
            n_runs += 1
        else:
            n_runs += len(which)
    if not found:
        return [], []
    text = f"{_rows(sorted(found), names)} are equally spaced in D at constant N, as the logged steps of training runs are"
    if n_runs >= MIN_RUNS:
        return [], [f"{text}: if they are, they are not independent; name the runs by --run"]
    return [f"{text}: only {n_runs} runs would be independent; keep the last row of each run, or name runs by --run"], []


def _perplexity(rows: Rows) -> list[str]:
    median = float(np.median(rows.loss)) if len(rows) else 0.0
    if median <= MAX_MEDIAN_LOSS:
        return []
    return [
        f"the median loss is {median:.3g}: in nats per token that is worse than guessing among 160,000 tokens; "
        "if the column is perplexity, use its natural logarithm"
    ]


def _far_apart(rows: Rows, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Finds runs with the same N and D whose losses differ by more than seeds do; returns (reasons, warnings)."""
    points = repeated_points(rows)
    spreads = [float(np.ptp(np.log(rows.loss[point]))) for point in points]
    far = [point for point, spread in zip(points, spreads, strict=True) if spread > FAR_APART]
    if not far:
        return [], []
    widest = points[int(np.argmax(spreads))]
    losses = ", ".join(f"{loss:.4g}" for loss in sorted(rows.loss[widest])[:4])
    example = f"{_rows(widest, names)} (losses {losses})"
    text = f"{len(far):,} of {len(points):,} points of the same N and D have losses more than 3 % apart, such as {example}"
    if len(far) > len(points) / 2:
        return [f"{text}: the table mixes settings, such as tokenizers or data; select one by --where"], []
    return [], [f"{text}: these runs may differ in more than their seed"]
