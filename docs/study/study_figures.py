"""Draws the figures of the study, as PNG and SVG: a study and its numbers in, files in a folder out. Called by make.py.

The panels are those of the report; here several stand side by side, for a page that is 900 px wide.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmu_dist.report import factor_panels, panels
from lmu_dist.report.figures import house_style, save_figure, style_axes
from lmu_dist.report.forecasts import ForecastScores
from lmu_dist.report.panels import INK
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.compare import Comparison
from lmu_dist.scaling.pair import FIRST_FAMILIES, Pair
from lmu_dist.scaling.results import Results

WIDTH, PANEL_HEIGHT, COLUMNS = 10.0, 3.0, 3  # inches; panels of a row
LEGEND_ROW, LEGEND_COLUMNS = 0.2, 5
SHOWN_PAIRS = tuple(
    f"{new}_over_{base}" for base in ("transformer", "llama", "gated_deltanet", "mamba2") for new in FIRST_FAMILIES
)
Panel = tuple[str, Callable[[Axes], None]]  # title, what draws it


def draw_study(
    study: Study,
    results: Results,
    comparisons: Mapping[str, Comparison],
    forecasts: ForecastScores,
    order: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[str]:
    """Writes all figures for which the study has data, and returns their names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    of_pairs = [c for c in comparisons.values() if any(s.curves.known or s.curves.bound or s.laws.known for s in c.sizes)]
    figures: dict[str, list[Panel]] = {
        "main": _main(study, results, of_pairs),
        "loss_vs_tokens": [(f"N = {n:,}", lambda axes, n=n: panels.tokens(axes, study, results, n)) for n in study.size_bins],
        "factors": [(_title(study, c), lambda axes, c=c: _factor(axes, study, c)) for c in of_pairs if _name(c) in SHOWN_PAIRS],
        "order": [
            (f"N = {cell['n_params']:,}, D = {panels.si(cell['tokens'])}", lambda axes, c=cell: loss_order(axes, study, c))
            for cell in _largest_budgets(order)
        ],
        "positions": [
            (f"N = {n:,}", lambda axes, n=n: panels.positions(axes, study, results, n))
            for n in sorted({p.n_params for p in results.positions})
        ],
        "forecasts": [("", lambda axes: panels.forecasts(axes, study, forecasts.counted))] if forecasts.counted else [],
    }
    drawn = {name: found for name, found in figures.items() if found}
    for name, found in drawn.items():
        with house_style(name):
            save_figure(_draw(found), folder, name, f"runs {study.digest}")
    return list(drawn)


def draw_contexts(contexts: Mapping[int, tuple[Study, Results]], digest: str, folder: Path) -> None:
    """Writes the figure of the losses by position, a panel for each length of context in tokens; nothing without any."""
    found: list[Panel] = [
        (f"{n:,} tokens of context", lambda axes, study=study, results=results: _all_positions(axes, study, results))
        for n, (study, results) in contexts.items()
    ]
    if found:
        with house_style("contexts"):
            save_figure(_draw(found), folder, "contexts", f"runs {digest}")


def _all_positions(axes: Axes, study: Study, results: Results) -> None:
    for n in sorted({position.n_params for position in results.positions}):
        panels.positions(axes, study, results, n)


def _main(study: Study, results: Results, comparisons: Sequence[Comparison]) -> list[Panel]:
    """Loss against tokens at the largest size that all families have, and the factors over two baselines there."""
    common = [n for n in study.size_bins if all(study.runs_of(family, n) for family in study.families)]
    found: list[Panel] = [
        (f"N = {n:,}", lambda axes, n=n: panels.tokens(axes, study, results, n)) for n in (common or study.size_bins)[-1:]
    ]
    for base in dict.fromkeys(c.base for c in comparisons):
        of_base = [c for c in comparisons if c.base == base]
        if len(of_base) == len(study.families) - 1 and len(found) < COLUMNS:
            draw_panel = lambda axes, of_base=of_base: factor_panels.all_families(axes, study, of_base)  # noqa: E731
            found.append((f"over {study.title(base)}, largest N", draw_panel))
    return found


def _name(comparison: Comparison) -> str:
    return Pair(comparison.base, comparison.new).name


def _title(study: Study, comparison: Comparison) -> str:
    return f"{study.title(comparison.new)} over {study.title(comparison.base)}"


def _factor(axes: Axes, study: Study, comparison: Comparison) -> None:
    factor_panels.efficiency(axes, study, comparison, Pair(comparison.base, comparison.new).claimed_factor)


def _largest_budgets(order: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each size the cell with most families, and of these the one with most tokens."""
    best = dict[int, Mapping[str, Any]]()
    for cell in order:
        known = best.get(cell["n_params"])
        if known is None or (len(cell["families"]), cell["tokens"]) > (len(known["families"]), known["tokens"]):
            best[cell["n_params"]] = cell
    return list(best.values())


def loss_order(axes: Axes, study: Study, cell: Mapping[str, Any]) -> None:
    """Draws the losses of the families at one N and D with their intervals, the best family on top."""
    rows = list(reversed(cell["families"]))
    for y, row in enumerate(rows):
        look = study.appearances[row["family"]]
        reach = None if row["low"] is None else [[row["loss"] - row["low"]], [row["high"] - row["loss"]]]
        axes.errorbar([row["loss"]], [y], xerr=reach, fmt=look.marker, color=look.colour, markersize=5, capsize=3)
    axes.set_yticks(range(len(rows)), [study.title(row["family"]) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("validation loss (nats per token)")


def _draw(found: Sequence[Panel]) -> Figure:
    """Returns a figure with the panels side by side, and one legend below them if they name what they show."""
    columns = min(COLUMNS, len(found))
    n_rows = ceil(len(found) / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH / 2, PANEL_HEIGHT * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, columns, squeeze=False).ravel().tolist()
    labels = dict[str, Any]()
    for (title, draw_panel), axes in zip(found, grid, strict=False):
        style_axes(axes)
        draw_panel(axes)
        axes.set_title(title, fontsize=9, color=INK)
        handles, names = axes.get_legend_handles_labels()
        labels |= {name: handle for name, handle in zip(names, handles, strict=True) if name not in labels}
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    if labels:
        legend_columns = LEGEND_COLUMNS if columns > 1 else LEGEND_COLUMNS // 2 + 1
        rows_of_legend = ceil(len(labels) / legend_columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows_of_legend)
        place = {"loc": "outside lower center", "ncols": legend_columns, "frameon": False, "labelcolor": INK}
        figure.legend(list(labels.values()), list(labels), **place)
    return figure
