"""Draws a fit of a table into one figure: a comparison in, a PNG, SVG or PDF file out. Used by `lmu-dist fit --plot`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmu_dist.scaling.compare_laws import LawComparison
from lmu_dist.scaling.forecast import Forecast
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.objective import losses
from lmu_dist.scaling.table import size_bins

MAX_CURVES = 8  # sizes that get a curve; more would hide each other
COLORS = "viridis"


def plot_fit(comparison: LawComparison, path: Path, forecast: Forecast | None = None) -> None:
    """Writes a figure of two panels: loss against tokens with the chosen law's curves, and the misses of every run."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, misses = figure.subplots(1, 2)
    chosen = comparison.chosen or next((c for c in comparison.candidates if c.fit is not None), None)
    _draw_curves(curves, comparison, forecast)
    if chosen is not None and chosen.fit is not None:
        rows = comparison.rows
        relative = 100 * (losses(chosen.fit.law, rows) / rows.loss - 1)
        points = misses.scatter(rows.n_params, relative, c=np.log10(rows.tokens), cmap=COLORS, s=16)
        figure.colorbar(points, ax=misses, label="log10 of training tokens D")
        misses.axhline(0, color="0.5", linewidth=1)
        verdict = "supported by the table" if comparison.chosen else "not determined"
        misses.set_title(f"Misses of {chosen.name} ({verdict})")
    misses.set(xscale="log", xlabel="parameters N", ylabel="predicted - measured loss, % of the loss")
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, comparison: LawComparison, forecast: Forecast | None) -> None:
    rows, bins = comparison.rows, size_bins(comparison.rows.n_params)
    sizes = np.unique(bins)
    shown = sizes[np.unique(np.linspace(0, len(sizes) - 1, MAX_CURVES).round().astype(int))]
    span = np.geomspace(rows.tokens.min(), rows.tokens.max(), 200)
    for size in shown:
        which = bins == size
        color = _color(size, sizes)
        axes.scatter(rows.tokens[which], rows.loss[which], s=16, color=color, label=f"N = {size:.3g}")
        chosen = comparison.chosen
        if chosen is not None and chosen.fit is not None and not chosen.form.NEEDS_UNIQUE:
            axes.plot(span, chosen.fit.law.loss(np.full_like(span, size), span), color=color, linewidth=1)
    if forecast is not None and not forecast.reasons:
        ends = np.stack([forecast.loss - forecast.low, forecast.high - forecast.loss])
        style = {"fmt": "D", "color": "black", "markersize": 4, "capsize": 3}
        axes.errorbar(forecast.tokens, forecast.loss, yerr=np.maximum(ends, 0), label="predicted, 90 %", **style)
    axes.set(xscale="log", yscale="log", xlabel="training tokens D", ylabel="loss in nats per token")
    axes.set_title("Loss and the chosen law" if comparison.chosen else "Loss; no law is determined")
    axes.legend(fontsize=8)


def _color(size: float, sizes: Floats) -> tuple[float, float, float, float]:
    import matplotlib

    place = np.log(size / sizes[0]) / max(float(np.log(sizes[-1] / sizes[0])), 1e-9)
    return matplotlib.colormaps[COLORS](0.9 * place)
