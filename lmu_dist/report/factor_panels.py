"""Draws data-efficiency factors on matplotlib axes: comparisons of families in; report/figures makes figures of them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lmu_dist.report.panels import FAINT, INK, log_axes
from lmu_dist.scaling.answer import best_known_factor
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.compare import Comparison
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.results import Results


def efficiency(axes: Axes, study: Study, comparison: Comparison, claimed: float | None) -> None:
    """Draws the data-efficiency factor against N, from curves and from laws, with intervals and bounds."""
    _factor_lines(axes, claimed)
    colour = study.appearances[comparison.new].colour
    for shift, marker, pick, label in ((0.97, "o", lambda s: s.curves, "curves"), (1.03, "s", lambda s: s.laws, "laws")):
        first = True
        for size in comparison.sizes:
            factor: Factor = pick(size)
            x = size.n_params * shift
            if factor.value is not None:
                y, ends = factor.value, factor.interval
                reach = [[y - ends[0]], [ends[1] - y]] if ends else None
                fill = colour if marker == "o" else "none"
                axes.errorbar([x], [y], yerr=reach, fmt=marker, color=colour, markerfacecolor=fill, capsize=3,
                              label=f"from {label}" if first else None)  # fmt: skip
                first = False
            elif factor.bound:
                up = factor.bound[0] == ">"
                axes.plot([x], [factor.bound[1]], "^" if up else "v", color=FAINT, markersize=8)
    log_axes(axes, x=True, y=True, y_shows=(0.5, 1.5 * (claimed or 2)))
    axes.set_xlabel("parameters N, without embeddings")
    axes.set_ylabel("data-efficiency factor")


def all_families(axes: Axes, study: Study, comparisons: Sequence[Comparison]) -> None:
    """Draws the factor of every family at the largest size that it has in common with the base, the highest family on top."""
    shown = [c for c in reversed(comparisons) if c.sizes]
    for y, comparison in enumerate(shown):
        look, (factor, _) = study.appearances[comparison.new], best_known_factor(comparison.sizes[-1])
        if factor.value is not None:
            reach = [[factor.value - factor.interval[0]], [factor.interval[1] - factor.value]] if factor.interval else None
            fill = look.colour if factor.interval else "none"
            style = {"fmt": look.marker, "color": look.colour, "markerfacecolor": fill, "markersize": 4, "capsize": 4}
            axes.errorbar([factor.value], [y], xerr=reach, **style)
        elif factor.bound:
            axes.plot([factor.bound[1]], [y], ">" if factor.bound[0] == ">" else "<", color=FAINT, markersize=8)
    axes.axvline(1, color=INK, linewidth=0.8)
    log_axes(axes, x=True, x_shows=(0.8, 1.25))
    axes.set_yticks(range(len(shown)), [study.title(c.new) for c in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("data-efficiency factor")


def by_position(axes: Axes, study: Study, results: Results) -> None:
    """Draws the data-efficiency factor against position."""
    assert results.by_position is not None
    for first, last, factor in results.by_position.bins:
        if factor.value is not None and factor.interval is not None:
            reach = [[factor.value - factor.interval[0]], [factor.interval[1] - factor.value]]
            axes.errorbar(
                [np.sqrt(first * last)],
                [factor.value],
                yerr=reach,
                fmt="o",
                color=study.appearances[results.pair.new].colour,
                markersize=4,
                capsize=2,
            )
    _factor_lines(axes, results.pair.claimed_factor)
    log_axes(axes, x=True, y=True)
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("data-efficiency factor")


def _factor_lines(axes: Axes, claimed: float | None) -> None:
    """Draws the factor that the paper claims for the pair, if there is one, and a factor of 1."""
    if claimed is not None:
        axes.axhline(claimed, color=INK, linestyle=":", linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.8)
