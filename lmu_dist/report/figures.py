"""Figures of a study: results in, PNG and SVG files and the same SVG for the page out.

Every figure is one panel of a phone's width. Families differ in colour (told apart by the colour-blind), marker and line. In
the page, colours are CSS variables, so that one drawing serves light and dark.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lmu_dist.scaling.answer import BASE, CLAIM, NEW
from lmu_dist.scaling.collect import Study, title
from lmu_dist.scaling.collect import rows as table_of
from lmu_dist.scaling.compare import Comparison, at_size
from lmu_dist.scaling.compute import SIX_ND
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.fit import log_residuals
from lmu_dist.scaling.laws import Floats, paper_loss
from lmu_dist.scaling.positions import binned
from lmu_dist.scaling.results import FamilyFit, Results

INK, FAINT = "#1b1f24", "#9aa3ad"
# family: colour on light, CSS variable, marker, line.
LOOKS = {
    "lmu": ("#0072b2", "--lmu", "o", "-"),
    "lmu_attention": ("#00805d", "--lmu-attention", "s", "-."),
    "transformer": ("#d55e00", "--transformer", "^", "--"),
    "lstm": ("#a8508a", "--lstm", "D", ":"),
}
OTHER = ("#6b5b00", "--other", "v", "-")
VARIABLES = {INK: "--ink", FAINT: "--faint", OTHER[0]: OTHER[1]} | {look[0]: look[1] for look in LOOKS.values()}
MOST_SIZES = 8  # panels of loss against tokens


@dataclass(frozen=True)
class Drawn:
    """A figure: its file name without suffix, what it shows, how to read it, and its SVG with CSS variables for colours."""

    name: str
    section: str
    heading: str
    caption: str
    svg: str


Paint = Callable[[Axes], None]


def draw(study: Study, results: Results, folder: Path) -> list[Drawn]:
    """Writes all figures that the study has points for, in the order of the page."""
    drawn = list[Drawn]()
    for name, section, heading, caption, paint in _figures(study, results):
        with rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": INK, "text.color": INK}
        ):
            figure = Figure(figsize=(5.0, 3.5), layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
            axes.tick_params(colors=INK, which="both")
            axes.xaxis.label.set_color(INK)
            axes.yaxis.label.set_color(INK)
            paint(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False, fontsize=8, labelcolor=INK)
            figure.savefig(folder / f"{name}.png", dpi=160)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        drawn.append(Drawn(name, section, heading, caption, _themed(text.getvalue(), heading)))
    return drawn


def look(family: str) -> tuple[str, str, str, str]:
    """Colour, CSS variable, marker and line of a family."""
    return LOOKS.get(family, OTHER)


def _themed(svg: str, heading: str) -> str:
    """For the page: no XML header, no fixed size, colours as variables, a title for those who listen."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(
        r'<g id="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|PathCollection|LineCollection|'
        r'FillBetweenPolyCollection)_?\d*"',
        "<g",
        svg,
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px 'DejaVu Sans'[^;\"]*", r"font: \1px var(--sans)", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{heading}" ', 1)


def _figures(study: Study, results: Results) -> Iterator[tuple[str, str, str, str, Paint]]:
    yield (
        "loss_vs_n",
        "size",
        "Loss against size",
        "Each family at its largest budget, seeds averaged. Thin lines: the paper's curves, after 13 billion tokens of other "
        "text in another vocabulary, so compare slopes and order, not heights.",
        lambda axes: _loss_vs_n(axes, study),
    )
    asked = next((c for c in results.comparisons if (c.base, c.new) == (BASE, NEW)), None)
    if asked and any(size.curves.known or size.curves.bound or size.laws.known for size in asked.sizes):
        yield (
            "efficiency",
            "efficiency",
            f"Tokens of the {title(BASE)} over tokens of the {title(NEW)}",
            "How many times the tokens for the same loss, at equal N, with 90 % intervals if there are any. Arrows are bounds: "
            "no loss was seen of both. The dotted line is the paper's ten.",
            lambda axes: _efficiency(axes, asked),
        )
    sizes = study.rungs if len(study.rungs) <= MOST_SIZES else study.rungs[:: -(-len(study.rungs) // MOST_SIZES)]
    for n in sizes:
        yield (
            f"tokens_{n}",
            "tokens",
            f"Loss against tokens at N = {n:,}",
            "The horizontal distance between two curves is the factor.",
            lambda axes, n=n: _tokens(axes, study, results, n),
        )
    if results.positions:
        largest = max(p.n_params for p in results.positions)
        yield (
            "position",
            "position",
            f"Loss against position in the row, N = {largest:,}",
            "Largest budget, seeds averaged, in bins of half a doubling. Where a curve is level, more context does not help.",
            lambda axes: _positions(axes, results, largest),
        )
    if results.by_position and any(f.known for _, _, f in results.by_position.bins):
        yield (
            "efficiency_by_position",
            "position",
            f"The factor by position, N = {results.by_position.n_params:,}",
            "From the curves of loss against tokens in each bin of positions, with 90 % intervals; gaps: no loss in common.",
            lambda axes: _by_position(axes, results),
        )
    yield (
        "frontier",
        "compute",
        "Loss against compute",
        "Every run at its 6 N D FLOPs; lines: the least loss a law with a certificate gives for the compute.",
        lambda axes: _frontier(axes, study, results),
    )
    for fitted in results.fits:
        curves = [p for p in fitted.conventions[0].parabolas if p.coefficients]
        if curves:
            yield (
                f"isoflop_{fitted.family}",
                "compute",
                f"Runs of equal compute, {title(fitted.family)}",
                "Loss against N at one 6 N D, and its parabola; a star where the least loss lies inside the sizes tried.",
                lambda axes, fitted=fitted: _isoflop(axes, fitted),
            )
    if any(f.examination.law for f in results.fits):
        for axis in ("n", "d"):
            name = {"n": "parameters N", "d": "tokens D"}[axis]
            yield (
                f"residuals_{axis}",
                "fits",
                f"Residuals against {name}",
                "ln loss seen over predicted, each run; a trend means that the law is wrong there, not only noisy.",
                lambda axes, axis=axis: _residuals(axes, study, results, axis),
            )


def _loss_vs_n(axes: Axes, study: Study) -> None:
    sizes = np.geomspace(study.rungs[0] / 1.3, study.rungs[-1] * 1.3, 60)
    for family in study.families:
        colour, _, marker, line = look(family)
        budget = max(run.record.planned_tokens for run in study.of(family))
        losses = dict[int, list[float]]()
        for run in study.of(family):
            if run.record.planned_tokens == budget:
                losses.setdefault(run.rung, []).append(np.log(run.record.val_loss_nats))
        points = sorted((n, float(np.exp(np.mean(logs)))) for n, logs in losses.items())
        label = f"{title(family)}, {si(budget)} tokens"
        axes.plot(*zip(*points, strict=True), line, marker=marker, markersize=5, linewidth=1.4, color=colour, label=label)
        try:
            axes.plot(sizes, paper_loss(family, sizes), line, color=colour, linewidth=0.7, alpha=0.7)
        except KeyError:
            continue
    _log(axes, x=True, y=True)
    axes.set_xlabel("parameters N, without embeddings")
    axes.set_ylabel("validation loss (nats per token)")


def _efficiency(axes: Axes, asked: Comparison) -> None:
    axes.axhline(CLAIM, color=INK, linestyle=":", linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.8)
    colour = look(asked.new)[0]
    for shift, marker, pick, label in ((0.97, "o", lambda s: s.curves, "curves"), (1.03, "s", lambda s: s.laws, "laws")):
        first = True
        for size in asked.sizes:
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
    axes.set_ylim(min(0.5, axes.get_ylim()[0]), max(15, axes.get_ylim()[1]))
    _log(axes, x=True, y=True)
    axes.set_xlabel("parameters N, without embeddings")
    axes.set_ylabel("times the tokens")


def _tokens(axes: Axes, study: Study, results: Results, rung: int) -> None:
    laws = {f.family: f.examination.law for f in results.fits}
    for family in study.families:
        runs = study.of(family, rung)
        if not runs:
            continue
        colour, _, marker, line = look(family)
        tokens = np.array([r.record.tokens for r in runs], np.float64)
        axes.plot(tokens, [r.record.val_loss_nats for r in runs], marker, color=colour, markersize=4, label=title(family))
        law = laws[family]
        if law is not None:
            dense = np.geomspace(tokens.min(), tokens.max(), 50)
            axes.plot(dense, law.loss(rung, dense), line, color=colour, linewidth=1)
        else:
            curve = at_size(study, family, rung)
            axes.plot(curve.tokens, curve.loss, line, color=colour, linewidth=1)
    _log(axes, x=True, y=True)
    axes.set_xlabel("training tokens D")
    axes.set_ylabel("validation loss (nats per token)")


def _positions(axes: Axes, results: Results, rung: int) -> None:
    for position in results.positions:
        if position.n_params != rung:
            continue
        colour, _, marker, line = look(position.family)
        bins = binned(np.array(position.losses))
        middle = np.sqrt(np.array(bins.first, float) * np.array(bins.last))
        axes.plot(
            middle, bins.loss, line, marker=marker, markersize=3, color=colour, linewidth=1.2, label=title(position.family)
        )
        if position.flat_from:
            axes.axvline(position.flat_from, color=colour, linewidth=0.7, alpha=0.6)
    _log(axes, x=True)
    axes.set_xlabel("position in the row (tokens)")
    axes.set_ylabel("validation loss (nats per token)")


def _by_position(axes: Axes, results: Results) -> None:
    assert results.by_position is not None
    for first, last, factor in results.by_position.bins:
        if factor.value is not None and factor.interval is not None:
            reach = [[factor.value - factor.interval[0]], [factor.interval[1] - factor.value]]
            axes.errorbar(
                [np.sqrt(first * last)], [factor.value], yerr=reach, fmt="o", color=look(NEW)[0], markersize=4, capsize=2
            )
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.axhline(CLAIM, color=INK, linestyle=":", linewidth=1)
    _log(axes, x=True, y=True)
    axes.set_xlabel("position in the row (tokens)")
    axes.set_ylabel("times the tokens")


def _frontier(axes: Axes, study: Study, results: Results) -> None:
    for fitted in results.fits:
        colour, _, marker, line = look(fitted.family)
        runs = study.of(fitted.family)
        flops = np.array([6.0 * r.record.n_params * r.record.tokens for r in runs])
        axes.plot(
            flops,
            [r.record.val_loss_nats for r in runs],
            marker,
            color=colour,
            markersize=3,
            alpha=0.6,
            label=title(fitted.family),
        )
        law = fitted.examination.law
        if law is not None:
            dense = np.geomspace(flops.min(), flops.max(), 60)
            axes.plot(dense, law.loss(*law.optimum(dense)), line, color=colour, linewidth=1.2)
    _log(axes, x=True, y=True)
    axes.set_xlabel("training compute (6 N D FLOPs)")
    axes.set_ylabel("validation loss (nats per token)")


def _isoflop(axes: Axes, fitted: FamilyFit) -> None:
    convention = next(c for c in fitted.conventions if c.counting_flops == SIX_ND)
    colour = look(fitted.family)[0]
    curves = [p for p in convention.parabolas if p.coefficients]
    for i, parabola in enumerate(curves):
        alpha = 0.35 + 0.65 * i / max(1, len(curves) - 1)
        axes.plot(parabola.sizes, parabola.losses, "o", color=colour, markersize=3, alpha=alpha)
        dense = np.geomspace(parabola.sizes[0], parabola.sizes[-1], 50)
        axes.plot(dense, parabola.loss(dense), "-", color=colour, linewidth=1, alpha=alpha)
        end = (parabola.sizes[-1], parabola.losses[-1])
        axes.annotate(f" {parabola.flops:.0e}", end, fontsize=7, color=INK, va="center")
        if parabola.n_params:
            axes.plot([parabola.n_params], parabola.loss(np.array([parabola.n_params])), "*", color=INK, markersize=8)
    _log(axes, x=True)
    axes.margins(x=0.12)
    axes.set_xlabel("parameters N, without embeddings")
    axes.set_ylabel("validation loss (nats per token)")


def _residuals(axes: Axes, study: Study, results: Results, axis: str) -> None:
    axes.axhline(0, color=INK, linewidth=0.8)
    for i, fitted in enumerate(results.fits):
        if fitted.examination.law is None:
            continue
        colour, _, marker, _ = look(fitted.family)
        table = table_of(study.of(fitted.family))
        x: Floats = table.n_params if axis == "n" else table.tokens
        residual = -log_residuals(fitted.examination.law, table)
        axes.plot(x * 1.04 ** (i - 1.5), residual, marker, color=colour, markersize=3, alpha=0.8, label=title(fitted.family))
    _log(axes, x=True)
    axes.set_xlabel({"n": "parameters N, without embeddings", "d": "training tokens D"}[axis])
    axes.set_ylabel("ln(seen / predicted)")


def _log(axes: Axes, x: bool = False, y: bool = False) -> None:
    """Logarithmic axes that label what is between decades where there are few of them."""
    for wanted, scaled, axis, limits in (
        (x, axes.set_xscale, axes.xaxis, axes.get_xlim),
        (y, axes.set_yscale, axes.yaxis, axes.get_ylim),
    ):
        if not wanted:
            continue
        scaled("log")
        low, high = limits()
        if high / low < 3:
            subs = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9)
        else:
            subs = (1, 2, 5) if high / low < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
        axis.set_minor_formatter(NullFormatter())


def si(value: float) -> str:
    """A number with its decimal prefix; beyond these as a power of ten."""
    for unit, letter in ((1e12, ""), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value:.0e}".replace("e+", "e") if not letter else f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
