"""Draws the content of each figure on matplotlib axes. Colour, marker and line of a family are the study's."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lmu_dist.report.forecasts import ForecastScore
from lmu_dist.scaling.collect import Study, rows_from_runs
from lmu_dist.scaling.compare import loss_curve
from lmu_dist.scaling.compute import SIX_ND, within_table
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.objective import log_residuals
from lmu_dist.scaling.positions import bin_positions
from lmu_dist.scaling.published import paper_loss
from lmu_dist.scaling.results import FamilyFit, Results

INK, FAINT = "#1b1f24", "#9aa3ad"


def loss_vs_n(axes: Axes, study: Study) -> None:
    """Draws loss against N per family, and the paper's curves."""
    sizes = np.geomspace(study.size_bins[0] / 1.3, study.size_bins[-1] * 1.3, 60)
    for family in study.families:
        look = study.appearances[family]
        colour, marker, line = look.colour, look.marker, look.line
        budget = max(run.budget_bin for run in study.runs_of(family))
        losses = dict[int, list[float]]()
        for run in study.runs_of(family):
            if run.budget_bin == budget:
                losses.setdefault(run.size_bin, []).append(np.log(run.record.val_loss_nats))
        points = sorted((n, float(np.exp(np.mean(logs)))) for n, logs in losses.items())
        label = f"{study.title(family)}, {si(budget)} tokens"
        axes.plot(*zip(*points, strict=True), line, marker=marker, markersize=5, linewidth=1.4, color=colour, label=label)
        try:
            axes.plot(sizes, paper_loss(family, sizes), line, color=colour, linewidth=0.7, alpha=0.7)
        except KeyError:
            continue
    log_axes(axes, x=True, y=True)
    axes.set_xlabel("parameters N, without embeddings")
    axes.set_ylabel("validation loss (nats per token)")


def tokens(axes: Axes, study: Study, results: Results, size_bin: int) -> None:
    """Draws loss against tokens at one size; the lines are the fitted laws, or else connect the points."""
    laws = {f.family: f.result.law for f in results.fits}
    for family in study.families:
        runs = study.runs_of(family, size_bin)
        if not runs:
            continue
        look = study.appearances[family]
        colour, marker, line = look.colour, look.marker, look.line
        tokens = np.array([r.record.tokens for r in runs], np.float64)
        axes.plot(tokens, [r.record.val_loss_nats for r in runs], marker, color=colour, markersize=4)
        axes.plot([], [], line, marker=marker, color=colour, markersize=4, linewidth=1, label=study.title(family))
        law = laws[family]
        if law is not None:
            dense = np.geomspace(tokens.min(), tokens.max(), 50)
            axes.plot(dense, law.loss(size_bin, dense), line, color=colour, linewidth=1)
        else:
            curve = loss_curve(study, family, size_bin)
            axes.plot(curve.tokens, curve.loss, line, color=colour, linewidth=1)
    log_axes(axes, x=True, y=True)
    axes.set_xlabel("training tokens D")
    axes.set_ylabel("validation loss (nats per token)")


def positions(axes: Axes, study: Study, results: Results, size_bin: int) -> None:
    """Draws loss against position at one size; a thin vertical line marks where it becomes level."""
    for position in results.positions:
        if position.n_params != size_bin:
            continue
        look = study.appearances[position.family]
        colour, marker, line = look.colour, look.marker, look.line
        bins = bin_positions(np.array(position.losses))
        middle = np.sqrt(np.array(bins.first, float) * np.array(bins.last))
        axes.plot(
            middle,
            bins.loss,
            line,
            marker=marker,
            markersize=3,
            color=colour,
            linewidth=1.2,
            label=study.title(position.family),
        )
        if position.level.position and position.level.determined:
            axes.axvline(position.level.position, color=colour, linewidth=0.7, alpha=0.6)
    log_axes(axes, x=True)
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("validation loss (nats per token)")


def frontier(axes: Axes, study: Study, results: Results) -> None:
    """Draws loss against compute, and the lowest loss for a given compute according to the laws."""
    for fitted in results.fits:
        look = study.appearances[fitted.family]
        colour, marker, line = look.colour, look.marker, look.line
        runs = study.runs_of(fitted.family)
        flops = np.array([r.record.training_flops_per_token_kaplan * r.record.tokens for r in runs])
        axes.plot(
            flops,
            [r.record.val_loss_nats for r in runs],
            marker,
            color=colour,
            markersize=3,
            alpha=0.6,
            label=study.title(fitted.family),
        )
        law = fitted.result.law
        if law is not None:
            dense = np.geomspace(flops.min(), flops.max(), 60)
            n, d = law.optimum(dense)
            seen = within_table(rows_from_runs(runs), n, d)
            axes.plot(dense[seen], law.loss(n[seen], d[seen]), line, color=colour, linewidth=1.2)
    log_axes(axes, x=True, y=True)
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0e}".replace("e+", "e")))
    axes.set_xlabel("training compute (6 N D FLOPs)")
    axes.set_ylabel("validation loss (nats per token)")


def isoflop(axes: Axes, study: Study, fitted: FamilyFit) -> None:
    """Draws runs of equal compute and their parabolas."""
    convention = next(c for c in fitted.conventions if c.counting_flops == SIX_ND)
    colour = study.appearances[fitted.family].colour
    curves = [p for p in convention.parabolas if p.coefficients]
    for i, parabola in enumerate(curves):
        alpha = 0.35 + 0.65 * i / max(1, len(curves) - 1)
        axes.plot(parabola.sizes, parabola.losses, "o", color=colour, markersize=3, alpha=alpha)
        dense = np.geomspace(parabola.sizes[0], parabola.sizes[-1], 50)
        axes.plot(dense, parabola.loss(dense), "-", color=colour, linewidth=1, alpha=alpha)
        end = (parabola.sizes[-1], parabola.losses[-1])
        axes.annotate(f" {parabola.flops:.0e}".replace("e+", "e"), end, fontsize=7, color=INK, va="center")
        if parabola.n_params:
            axes.plot([parabola.n_params], parabola.loss(np.array([parabola.n_params])), "*", color=INK, markersize=8)
    log_axes(axes, x=True)
    axes.margins(x=0.12)
    axes.set_xlabel("parameters N, without embeddings")
    axes.set_ylabel("validation loss (nats per token)")


def residuals(axes: Axes, study: Study, results: Results, axis: str) -> None:
    """Draws the residual of each run from its law, against N (`n`) or D (`d`)."""
    axes.axhline(0, color=INK, linewidth=0.8)
    step, middle = 1.04 ** min(1, 8 / len(results.fits)), (len(results.fits) - 1) / 2  # families do not hide each other
    for i, fitted in enumerate(results.fits):
        if fitted.result.law is None:
            continue
        colour, marker = study.appearances[fitted.family].colour, study.appearances[fitted.family].marker
        table = rows_from_runs(study.runs_of(fitted.family))
        x: Floats = table.n_params if axis == "n" else table.tokens
        residual = -log_residuals(fitted.result.law, table)
        axes.plot(
            x * step ** (i - middle),
            residual,
            marker,
            color=colour,
            markersize=3,
            alpha=0.8,
            label=study.title(fitted.family),
        )
    log_axes(axes, x=True)
    axes.set_xlabel({"n": "parameters N, without embeddings", "d": "training tokens D"}[axis])
    axes.set_ylabel("ln(measured / predicted)")


def forecasts(axes: Axes, study: Study, scores: Sequence[ForecastScore]) -> None:
    """Draws by how much each actual loss differs from its forecast, and the interval of the forecast around zero.

    The axis ends at three times the largest difference, so that an interval of hundreds of per cent does not hide all others.
    """
    axes.axhline(0, color=INK, linewidth=0.8)
    titled, largest = set[str](), 1.0
    for i, score in enumerate(scores, 1):
        made, look = score.forecast, study.appearances[score.forecast.family]
        assert score.actual_nats is not None
        ends = [100 * (end / made.loss_nats - 1) for end in (made.low_nats, made.high_nats)]
        axes.plot([i, i], ends, "-", color=look.colour, linewidth=5, alpha=0.3, solid_capstyle="butt")
        label = None if made.family in titled else study.title(made.family)
        actual = 100 * (score.actual_nats / made.loss_nats - 1)
        axes.plot([i], [actual], look.marker, color=look.colour, markersize=5, label=label)
        titled.add(made.family)
        largest = max(largest, abs(actual))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -3 * largest), min(high, 3 * largest))
    axes.set_xlim(0.5, max(len(scores), 5) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("forecast, in the order in which they were made")
    axes.set_ylabel("actual loss over predicted, minus 1 (%)")


def log_axes(
    axes: Axes,
    x: bool = False,
    y: bool = False,
    x_shows: tuple[float, float] | None = None,
    y_shows: tuple[float, float] | None = None,
) -> None:
    """Makes axes logarithmic, with labels between decades if they span few. `x_shows` and `y_shows` are inside of the limits.

    Limits of a linear axis would be no limits of a logarithmic one: their margin may go below zero.
    """
    for wanted, shows, scaled, axis, get, put in (
        (x, x_shows, axes.set_xscale, axes.xaxis, axes.get_xlim, axes.set_xlim),
        (y, y_shows, axes.set_yscale, axes.yaxis, axes.get_ylim, axes.set_ylim),
    ):
        if not wanted:
            continue
        scaled("log")
        low, high = get()
        if shows is not None:
            low, high = min(low, shows[0]), max(high, shows[1])
            put(low, high)
        if high / low < 3:
            subs = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9)
        elif high / low < 10:
            subs = (1, 1.5, 2, 3, 5, 7)
        else:
            subs = (1, 2, 5) if high / low < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
        axis.set_minor_formatter(NullFormatter())


def si(value: float) -> str:
    """Formats a number with k, M or B; from 1e12 on as a power of ten."""
    for unit, letter in ((1e12, ""), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value:.0e}".replace("e+", "e") if not letter else f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
