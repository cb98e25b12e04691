"""Figures whose axes show all that is drawn on them, read from the axes themselves."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from simulate import simulate_study

from lmu_dist import report
from lmu_dist.models.registry import built_in
from lmu_dist.report.factor_panels import all_families, efficiency
from lmu_dist.report.panels import log_axes
from lmu_dist.scaling.collect import select_runs
from lmu_dist.scaling.compare import Comparison, SizeComparison
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.tracking.stored_runs import StoredRun, StoredRuns

UNKNOWN = Factor(None, None, None, None, None, "no law")


def comparison(factors: dict[int, tuple[float, float, float]]) -> Comparison:
    """Factors by size: value, and the ends of the interval."""
    sizes = [
        SizeComparison(n, Factor(value, (low, high), None, None, None, ""), UNKNOWN)
        for n, (value, low, high) in factors.items()
    ]
    return Comparison("transformer", "lmu", tuple(sizes), None, None, "", (0, 0), "")


@pytest.mark.parametrize("claimed", [10.0, None])
@pytest.mark.parametrize("low", [0.9, 0.46, 0.01])
def test_factors_below_one_leave_the_axis_as_it_is(low: float, claimed: float | None):
    """On a linear axis up to 10 the margin below 0.46 goes below zero, where a logarithmic axis has no limit."""
    records = simulate_study(("lmu", "transformer"), (1000, 10_000), (10**6, 10**7), (0,))
    runs = tuple(StoredRun(f"r{i}", f"run-{i}", "complete", r, {}, "", 1, 2, "1") for i, r in enumerate(records))
    study = select_runs(StoredRuns("simulated", runs, (), "transformer"))
    drawn = comparison({1000: (0.95, low, 1.2), 10_000: (1.2, 1.0, 1.4)})
    axes = Figure().subplots()
    efficiency(axes, study, drawn, claimed)
    bottom, top = axes.get_ylim()
    assert 0.2 * low < bottom < low
    assert (claimed or 1.4) < top < 10 * (claimed or 1.4)
    axes = Figure().subplots()
    all_families(axes, study, [replace(drawn, sizes=drawn.sizes[:1])])
    left, right = axes.get_xlim()
    assert 0.2 * low < left < low
    assert 1.2 < right < 5


def test_logarithmic_axes_show_what_they_are_told():
    axes = Figure().subplots()
    axes.plot([1, 2], [3, 5])
    log_axes(axes, x=True, y=True, y_shows=(0.5, 20))
    assert axes.get_ylim() == (0.5, 20)
    assert 0.8 < axes.get_xlim()[0] < 1


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb as in WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_built_in_families_differ_in_every_figure_and_stand_out_from_the_page():
    looks = [family.appearance() for family in built_in().values()]
    page = (Path(report.__file__).parent / "page.html").read_text()
    light, dark, *_ = re.findall(r"--paper: (#[0-9a-f]+);", page)
    assert light == "#fff"
    for colours, paper in (([look.colour for look in looks], "#ffffff"), ([look.colour_dark for look in looks], dark)):
        assert len(set(colours)) == len(looks)
        for colour in colours:  # 3:1 is what WCAG 2.2 asks of graphics
            low, high = sorted((luminance(colour), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) > 3, colour
    assert len({look.marker for look in looks}) == len(looks)
    assert len({look.title for look in looks}) == len(looks)
