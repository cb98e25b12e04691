"""Converts results to JSON types: dataclasses and numpy values in, dictionaries of numbers, text and null out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lmu_dist.scaling.compare_laws import LawComparison
from lmu_dist.scaling.forecast import Forecast
from lmu_dist.scaling.intervals import CONFIDENCE
from lmu_dist.scaling.laws import parameters
from lmu_dist.scaling.read_table import RunTable
from lmu_dist.scaling.validate import FitResult

FIT_VERSION = 2  # of the JSON of `lmu-dist fit`, see docs/fitting-a-table.md; 1 had no version and nothing about the table
UNITS = {"N": "parameters", "D": "training tokens", "U": "unique tokens", "L": "nats per token"}


def table_to_json(table: RunTable, file: Path, conditions: Sequence[str]) -> dict[str, Any]:
    """Returns what a fit's JSON says about its table: the file (- for standard input), columns, conditions, rows left out."""
    return {
        "version": FIT_VERSION,
        "file": str(file),
        "columns": {option.removeprefix("--"): name for option, name in table.columns.items()},
        "conditions": list(conditions),
        "n_rows": len(table.rows),
        "left_out": [{"reason": out.reason, "rows": list(out.rows)} for out in table.left_out],
        "notes": list(table.notes),
        "units": UNITS,
    }


def fit_to_json(result: FitResult, row_names: Sequence[str]) -> dict[str, Any]:
    """Returns a fit result as JSON types, without parameters and intervals if the fit failed a check.

    `row_names` has the name of every row of the table.
    """
    holdout, diagnostics, misfit = result.holdout, result.diagnostics, result.misfit
    facts = {
        "law": result.form.__name__.lower(),
        "formula": result.form.FORMULA,
        "n_rows": result.n_rows,
        "determined": result.diagnostics.passed,
        "objective": result.objective,
        "parameters": parameters(result.law) if result.law else {},
        "level": CONFIDENCE,
        "intervals": {k: list(v) for k, v in result.intervals.items()} if result.law else {},
        "profile_intervals": {k: list(v) if v else None for k, v in result.profiles.items()},
        "n_resamples": result.n_resamples,
        "certificate": {
            "ok": diagnostics.passed,
            "reasons": list(diagnostics.reasons),
            "n_starts": diagnostics.n_starts,
            "n_agreeing": diagnostics.n_agreeing,
            "gradient": diagnostics.gradient,
            "condition": diagnostics.condition,
        },
        "warnings": list(result.warnings),
        "misfit": None
        if misfit is None
        else asdict(misfit)
        | {
            "worst_rows": [row_names[row] for row in misfit.worst_rows],
            "outliers": [row_names[row] for row in misfit.outliers],
        },
        "holdout": None if holdout is None else asdict(holdout) | {"reasons": list(holdout.reasons)},
        "influence": {k: {"row": row_names[v.row], "without": v.without} for k, v in result.influence.items()},
    }
    return to_json(facts)


def comparison_to_json(comparison: LawComparison) -> dict[str, Any]:
    """Returns all laws on a table as JSON types; laws that are not determined have no parameters."""
    laws = [
        {
            "law": c.name,
            "formula": c.form.FORMULA,
            "parameters": parameters(c.fit.law) if c.fit and c.determined else {},
            "held": dict(c.constraints.held),
            "supported": c in comparison.supported,
            "weight": c.weight if c in comparison.supported else 0.0,
            "criterion": c.criterion,
            "held_out_error": c.held_out_error,
            "held_out": [asdict(held) for held in c.held_out],
            "reasons": list(c.reasons),
            "typical_miss": c.misfit.typical_miss if c.misfit else None,
            "worst_miss": c.misfit.worst_miss if c.misfit else None,
        }
        for c in comparison.candidates
    ]
    facts = {
        "laws": laws,
        "chosen": comparison.chosen.name if comparison.chosen else None,
        "supported": [c.name for c in comparison.supported],
        "form_fits": comparison.fits,
        "determined": comparison.determined,
        "level": CONFIDENCE,
        "reasons": list(comparison.reasons or (comparison.chosen.imprecise if comparison.chosen else ())),
        "warnings": list(comparison.warnings),
    }
    return to_json(facts)


def forecast_to_json(forecast: Forecast, names: Sequence[str]) -> dict[str, Any]:
    """Returns a forecast as JSON types: a point per entry."""
    columns = zip(
        names, *(getattr(forecast, name).tolist() for name in ("n_params", "tokens", "loss", "low", "high")), strict=True
    )
    points = [dict(zip(("name", "N", "D", "loss", "low", "high"), values, strict=True)) for values in columns]
    facts = {"points": points, "level": CONFIDENCE, "laws": dict(zip(forecast.laws, forecast.weights, strict=True))}
    return to_json(facts | {"reasons": forecast.reasons, "warnings": forecast.warnings})


def to_json(value: Any) -> Any:
    """Returns a value as JSON types: tuples become lists, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return to_json(value.item())
    return value
