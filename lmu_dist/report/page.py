"""Renders the report page: study, results and figures in, one self-contained HTML file out. The template is page.html."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from lmu_dist import __version__
from lmu_dist.report.figures import ReportFigure, css_variable
from lmu_dist.report.forecasts import ForecastScores
from lmu_dist.report.law_table import law_rows, law_sentence, misfit_sentence, p_text
from lmu_dist.scaling.band_table import band_sentences
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.laws import parameters
from lmu_dist.scaling.published import KAPLAN_NS, PAPER
from lmu_dist.scaling.results import PAPER_ORDER, Results

SECTIONS = (
    ("size", "Loss against size"),
    ("efficiency", "Data efficiency"),
    ("tokens", "Loss against tokens"),
    ("position", "Loss by position"),
    ("compute", "Compute"),
    ("fits", "Scaling laws"),
    ("forecasts", "Forecasts"),
)
ALWAYS = ("fits", "forecasts")  # sections that are there without a figure


def render(
    study: Study,
    results: Results,
    forecasts: ForecastScores,
    figures: Sequence[ReportFigure],
    reproduce: Sequence[tuple[str, str]],
) -> str:
    """Returns the page as HTML. `reproduce` has pairs of a result's name and the command that reproduces it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"g": _number, "pct": _percent, "n": _thousands, "interval": _interval, "difference": _difference}
    environment.filters |= {"share": _share, "p": p_text, "minute": _minute}
    environment.filters |= {"nats": _nats, "nats_interval": _nats_interval}
    run_names = {run.run_id: run.name or run.run_id for run in study.runs}
    environment.filters["run_name"] = run_names.__getitem__
    environment.globals |= {"css_variable": css_variable, "parameters": parameters, "title": study.title}
    environment.globals |= {"law_rows": law_rows, "law_sentence": law_sentence, "misfit_sentence": misfit_sentence}
    template = environment.from_string(files("lmu_dist.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        study=study,
        results=results,
        forecasts=forecasts,
        always=ALWAYS,
        other_laws=results.other_laws,
        figures={name: [f for f in figures if f.section == name] for name, _ in SECTIONS},
        sections=SECTIONS,
        reproduce=reproduce,
        pair=results.pair,
        band_sentences=band_sentences(results.bands, study.title),
        paper_order=PAPER_ORDER,
        show_controlled=_show_controlled(study, results),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        paper_exponents={name: law.exponent for name, law in PAPER.items()} | {"transformer": KAPLAN_NS.alpha_N},
        libraries={name: version(name) for name in ("numpy", "scipy", "mlflow")},
    )


def _show_controlled(study: Study, results: Results) -> bool:
    """Whether the controlled comparisons say more than the headline."""
    possible = {(c.base, c.new) for c in results.controlled if {c.base, c.new} <= set(study.families)}
    return bool(possible - {(results.pair.base, results.pair.new)})


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}g}" if abs(value) < 1e6 else f"{value:.{digits - 1}e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2%}"


def _share(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _minute(time: str) -> str:
    """Formats a time in ISO 8601 for people, as in "2026-11-27 20:12"."""
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _thousands(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"


def _interval(value: tuple[float, float] | None, digits: int = 3) -> str:
    return "-" if value is None else f"{_number(value[0], digits)} to {_number(value[1], digits)}"


def _nats(value: float | None) -> str:
    """Formats a difference of losses with three decimals: those of a table are below each other."""
    return "-" if value is None else f"{value:.3f}"


def _nats_interval(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{_nats(value[0])} to {_nats(value[1])}"


def _difference(nats: float, interval: tuple[float, float] | None) -> str:
    """Formats a loss difference, as in "0.13 (0.10 to 0.16) nats below"."""
    sign = 1 if nats >= 0 else -1
    ends = f" ({_interval((min(sign * end for end in interval), max(sign * end for end in interval)), 2)})" if interval else ""
    return f"{_number(abs(nats), 2)}{ends} nats {'below' if sign > 0 else 'above'}"
