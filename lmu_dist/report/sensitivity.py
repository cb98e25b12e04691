"""Draws how the loss depends on a tuned setting: the trials of each search in, a figure out. Used by `lmu-dist tune`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

# The palette of Okabe and Ito, which the colour-blind can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class SearchTrials:
    """The trials of one search as (setting, loss in nats): those that completed and those that were stopped early."""

    name: str
    complete: Sequence[tuple[float, float]]
    stopped: Sequence[tuple[float, float]]


def draw(path: Path, setting: str, searches: Sequence[SearchTrials], logarithmic: bool) -> None:
    """Writes a figure (PNG or SVG, by the suffix) of validation loss against a setting, with a line for every search."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for search, colour in zip(searches, COLOURS * len(searches), strict=False):
        points = sorted(search.complete)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=search.name, markersize=5, linewidth=1.2)
            best = min(points, key=lambda p: p[1])
            axes.plot(*best, "*", color=colour, markersize=15)
        if search.stopped:
            label = f"{search.name}: stopped early" if points else search.name
            axes.plot(*zip(*search.stopped, strict=True), "x", color=colour, alpha=0.6, label=label)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(setting)
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
