"""Draws the figures of a study: results in, PNG and SVG files and an SVG for the page out.

Every figure is one panel that fits the width of a phone. Families differ in colour (from a palette for the colour-blind),
marker and line style. In the page, colours are CSS variables, so that one SVG works in light and dark mode.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmu_dist.report import factor_panels, panels
from lmu_dist.report.forecasts import ForecastScores
from lmu_dist.report.panels import FAINT, INK
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.results import Results

MAX_SIZE_FIGURES = 8  # most figures of loss against tokens
MAX_COMPARISONS_WITHOUT_FIGURE = 3  # most families, without the base, whose factors are easily read in the table
MAX_LEGEND_INSIDE = 5  # most entries of a legend that fits between the curves
LEGEND_LINE_INCHES = 0.17


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the page: file name without suffix, section, heading, caption, and SVG with CSS variables as colours."""

    name: str
    section: str
    heading: str
    caption: str
    svg: str


FigureToDraw = tuple[str, str, str, str, Callable[[Axes], None]]  # name, section, heading, caption


def draw_figures(study: Study, results: Results, forecasts: ForecastScores, folder: Path) -> list[ReportFigure]:
    """Writes all figures for which the study has data, and returns them in the order of the page."""
    figures = list[ReportFigure]()
    families = {look.colour: css_variable(family) for family, look in study.appearances.items()}
    variables = {INK: "--ink", FAINT: "--faint"} | families
    for name, section, heading, caption, draw_panel in _figures(study, results, forecasts):
        with house_style(name):
            figure = Figure(figsize=(5.0, 3.5), layout="constrained")
            axes = style_axes(figure.subplots())
            draw_panel(axes)
            _draw_legend(figure, axes)
            save_figure(figure, folder, name)
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        figures.append(ReportFigure(name, section, heading, caption, _to_page_svg(text.getvalue(), heading, variables)))
    return figures


@contextmanager
def house_style(name: str) -> Iterator[None]:
    """Sets fonts and colours for a figure, and what makes its SVG the same each time."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": INK, "text.color": INK}):
        yield


def style_axes(axes: Axes) -> Axes:
    """Gives axes a grid, labels in ink and no frame at the top and the right; returns them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return axes


def save_figure(figure: Figure, folder: Path, name: str, description: str | None = None) -> None:
    """Writes a figure as PNG and SVG, and fixes its layout. `description` is kept in the SVG's metadata."""
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine(None)  # otherwise every file lays it out again, twice, which takes as long as drawing it
    figure.savefig(folder / f"{name}.png", dpi=160)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Description": description})


def _draw_legend(figure: Figure, axes: Axes) -> None:
    """Draws the legend inside the axes if it is short, else in two columns below them, and makes the figure taller."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > MAX_LEGEND_INSIDE:
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE_INCHES * -(-len(labels) // 2))
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    elif labels:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def css_variable(family: str) -> str:
    """The CSS variable with the colour of a family, light or dark as the page is."""
    return f"--family-{family.replace('_', '-')}"


def _to_page_svg(svg: str, heading: str, variables: Mapping[str, str]) -> str:
    """Returns an SVG for the page: no XML header, no fixed size, CSS variables as colours, a label for screen readers."""
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
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px 'DejaVu Sans'[^;\"]*", r"font: \1px var(--sans)", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{heading}" ', 1)


def _figures(study: Study, results: Results, forecasts: ForecastScores) -> Iterator[FigureToDraw]:
    yield (
        "loss_vs_n",
        "size",
        "Loss against size",
        "Validation loss of each family at its largest token budget, averaged over seeds. Thin lines: the paper's curves. They "
        "are for 13 billion tokens of another text with another vocabulary: compare slopes and order, not the loss itself.",
        lambda axes: panels.loss_vs_n(axes, study),
    )
    yield from _factor_figures(study, results)
    sizes = (
        study.size_bins
        if len(study.size_bins) <= MAX_SIZE_FIGURES
        else study.size_bins[:: -(-len(study.size_bins) // MAX_SIZE_FIGURES)]
    )
    for n in sizes:
        yield (
            f"tokens_{n}",
            "tokens",
            f"Loss against tokens at N = {n:,}",
            "The horizontal distance between two curves is the data-efficiency factor.",
            lambda axes, n=n: panels.tokens(axes, study, results, n),
        )
    if results.positions:
        largest = max(p.n_params for p in results.positions)
        yield (
            "position",
            "position",
            f"Loss against position in the sequence at N = {largest:,}",
            "Validation loss at the largest budget, averaged over seeds and over bins of positions (two bins per doubling). "
            "All families are evaluated on the same sequences, so they share some fluctuations. A vertical line marks where "
            "the loss of a family stops falling, if this could be determined.",
            lambda axes: panels.positions(axes, study, results, largest),
        )
    if results.by_position and any(f.known for _, _, f in results.by_position.bins):
        yield (
            "efficiency_by_position",
            "position",
            f"Data-efficiency factor by position at N = {results.by_position.n_params:,}",
            "Computed from loss against tokens in each bin of positions, with 90 % intervals. Bins in which the families have "
            "no loss in common are missing.",
            lambda axes: factor_panels.by_position(axes, study, results),
        )
    yield (
        "frontier",
        "compute",
        "Loss against compute",
        "Points: all runs, with compute 6 N D. Lines: the lowest loss for a given compute, according to each law whose fit "
        "passed its checks, shown only where the optimal N and D lie within the range of the runs.",
        lambda axes: panels.frontier(axes, study, results),
    )
    for fitted in results.fits:
        curves = [p for p in fitted.conventions[0].parabolas if p.coefficients]
        if curves:
            yield (
                f"isoflop_{fitted.family}",
                "compute",
                f"Runs of equal compute (isoFLOP), {study.title(fitted.family)}",
                "Loss against N for runs of equal compute 6 N D (FLOPs at the right end), with a fitted parabola. A star marks "
                "the minimum, if it lies within the sizes trained.",
                lambda axes, fitted=fitted: panels.isoflop(axes, study, fitted),
            )
    if any(f.result.law for f in results.fits):
        for axis in ("n", "d"):
            name = {"n": "parameters N", "d": "tokens D"}[axis]
            yield (
                f"residuals_{axis}",
                "fits",
                f"Residuals against {name}",
                "ln(measured loss / predicted loss) of every run. A trend shows where the law itself is wrong, beyond noise.",
                lambda axes, axis=axis: panels.residuals(axes, study, results, axis),
            )
    if forecasts.counted:
        yield (
            "forecasts",
            "forecasts",
            "Forecasts and what came of them",
            "Markers: the actual loss relative to the predicted one, for the first forecast of each cell that has ended. Bars: "
            "the 90 % interval of the forecast. About nine markers of ten should be on their bars.",
            lambda axes: panels.forecasts(axes, study, forecasts.counted),
        )


def _factor_figures(study: Study, results: Results) -> Iterator[FigureToDraw]:
    headline, pair = results.headline, results.pair
    if headline and any(size.curves.known or size.curves.bound or size.laws.known for size in headline.sizes):
        yield (
            "efficiency",
            "efficiency",
            f"Data-efficiency factor: {study.title(pair.base)} against {study.title(pair.new)}",
            f"Tokens that the {study.title(pair.base)} needs, divided by the tokens that the {study.title(pair.new)} needs "
            "for the same loss at equal N; with 90 % intervals where known. Triangles are bounds, where the families have no "
            "loss in common (pointing up: the factor is larger)."
            + (f" Dotted line: the factor of {pair.claimed_factor:g} that the paper claims." if pair.claimed_factor else ""),
            lambda axes: factor_panels.efficiency(axes, study, headline, pair.claimed_factor),
        )
    if len(results.comparisons) > MAX_COMPARISONS_WITHOUT_FIGURE:
        yield (
            "efficiency_all",
            "efficiency",
            f"Data-efficiency factor of every family over the {study.title(pair.base)}",
            f"At the largest size that the family and the {study.title(pair.base)} have in common, from laws if these give an "
            "interval, else from curves. Bars are 90 % intervals; an open marker has none. Triangles are bounds.",
            lambda axes: factor_panels.all_families(axes, study, results.comparisons),
        )
