"""Figures of a study: results in, PNG and SVG files and the same SVG for the page out.

Every figure is one panel of a phone's width. Families differ in colour (told apart by the colour-blind), marker and line. In
the page, colours are CSS variables, so that one drawing serves light and dark.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmu_dist.report import panels
from lmu_dist.report.panels import FAINT, INK, LOOKS, OTHER
from lmu_dist.scaling.answer import BASE, NEW
from lmu_dist.scaling.collect import Study, title
from lmu_dist.scaling.results import Results

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
        lambda axes: panels.loss_vs_n(axes, study),
    )
    asked = results.asked
    if asked and any(size.curves.known or size.curves.bound or size.laws.known for size in asked.sizes):
        yield (
            "efficiency",
            "efficiency",
            f"Tokens of the {title(BASE)} over tokens of the {title(NEW)}",
            "How many times the tokens for the same loss, at equal N, with 90 % intervals if there are any. Arrows are bounds: "
            "no loss was seen of both. The dotted line is the paper's ten.",
            lambda axes: panels.efficiency(axes, asked),
        )
    sizes = study.rungs if len(study.rungs) <= MOST_SIZES else study.rungs[:: -(-len(study.rungs) // MOST_SIZES)]
    for n in sizes:
        yield (
            f"tokens_{n}",
            "tokens",
            f"Loss against tokens at N = {n:,}",
            "The horizontal distance between two curves is the factor.",
            lambda axes, n=n: panels.tokens(axes, study, results, n),
        )
    if results.positions:
        largest = max(p.n_params for p in results.positions)
        yield (
            "position",
            "position",
            f"Loss against position in the row, N = {largest:,}",
            "Largest budget, seeds averaged, in bins of half a doubling; validation rows are the same for all, so are some of "
            "the wiggles. A line stands where a loss is level and the bins can tell.",
            lambda axes: panels.positions(axes, results, largest),
        )
    if results.by_position and any(f.known for _, _, f in results.by_position.bins):
        yield (
            "efficiency_by_position",
            "position",
            f"The factor by position, N = {results.by_position.n_params:,}",
            "From the curves of loss against tokens in each bin of positions, with 90 % intervals; gaps: no loss in common.",
            lambda axes: panels.by_position(axes, results),
        )
    yield (
        "frontier",
        "compute",
        "Loss against compute",
        "Every run at its 6 N D FLOPs; lines: the least loss a law with a certificate gives for the compute, where its optimum "
        "is among the sizes and tokens seen.",
        lambda axes: panels.frontier(axes, study, results),
    )
    for fitted in results.fits:
        curves = [p for p in fitted.conventions[0].parabolas if p.coefficients]
        if curves:
            yield (
                f"isoflop_{fitted.family}",
                "compute",
                f"Runs of equal compute, {title(fitted.family)}",
                "Loss against N at one 6 N D, and its parabola; a star where the least loss lies inside the sizes tried.",
                lambda axes, fitted=fitted: panels.isoflop(axes, fitted),
            )
    if any(f.examination.law for f in results.fits):
        for axis in ("n", "d"):
            name = {"n": "parameters N", "d": "tokens D"}[axis]
            yield (
                f"residuals_{axis}",
                "fits",
                f"Residuals against {name}",
                "ln loss seen over predicted, each run; a trend means that the law is wrong there, not only noisy.",
                lambda axes, axis=axis: panels.residuals(axes, study, results, axis),
            )
