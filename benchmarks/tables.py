"""Prints the rows of sections as tables, and computes ratios of the rows of two revisions. Called by speed.py.

In a row, measured values are floats or None. Strings and integers are the conditions of the measurement, and identify the row.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Found = dict[str, Any]
# Tables with one row per length n. They are printed as one table per quantity, with a column per length.
PIVOTED = {"points": ("n", ("tokens_per_second", "peak_bytes"))}
WIDTH = 200  # minimum characters per line; on a narrow terminal wrapped lines are better than truncated ones
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))
UNITS = {"bytes": "B", "bytes_per_second": "B/s", "seconds": "s", "flops_per_second": "FLOP/s"}


def measured(value: Any) -> bool:
    """Whether a value of a row is a measurement, not a condition."""
    return value is None or isinstance(value, float)


def identity(row: Row) -> tuple[tuple[str, Any], ...]:
    """The conditions of a row, which identify it."""
    return tuple((key, value) for key, value in row.items() if not measured(value))


def merged(rounds: Sequence[Sequence[Row]]) -> list[Row]:
    """Merges tables of several rounds: medians of the rows that all rounds have. A value is None if it is None in any round."""
    found = list[Row]()
    others = [{identity(row): row for row in rows} for rows in rounds[1:]]
    for first in rounds[0]:
        same = [first, *(rows[identity(first)] for rows in others if identity(first) in rows)]
        if len(same) < len(rounds):
            continue
        row = dict(first)
        for key in (key for key, value in first.items() if measured(value)):
            values = [one.get(key) for one in same]
            row[key] = None if None in values else statistics.median(values)
        found.append(row)
    return found


def ratios(base: Found, head: Found) -> Found:
    """The ratio head / base of each number that both have. Notes list the rows that only one has."""
    if error := base.get("error") or head.get("error"):
        return {"error": error}
    found: Found = {"tables": {}, "notes": []}
    for name in dict.fromkeys([*head["tables"], *base["tables"]]):
        before, after = ({identity(row): row for row in side["tables"].get(name, [])} for side in (base, head))
        both = [key for key in after if key in before]
        found["tables"][name] = [dict(key) | _ratios(before[key], after[key]) for key in both]
        for side, rows, others in (("head", after, before), ("base", before, after)):
            if only := [" ".join(str(value) for _, value in key) for key in rows if key not in others]:
                found["notes"].append(f"{name}: only in {side}: {', '.join(only)}")
    found["notes"] += [f"base: {note}" for note in base["notes"]]
    return found


def _ratios(before: Row, after: Row) -> Row:
    return {
        key: value / old if value is not None and (old := before.get(key)) else None
        for key, value in after.items()
        if measured(value)
    }


def show(title: str, found: Found) -> None:
    """Prints a section's tables and notes."""
    console = Console(width=max(WIDTH, Console().width))
    if "error" in found:
        console.print(f"{title}: {found['error']}", style="bold red", markup=False)
        return
    plain = "head / base" in title
    for name, rows in found["tables"].items():
        if rows and name in PIVOTED:
            across, quantities = PIVOTED[name]
            for quantity in quantities:
                _print(console, f"{title}: {name}, {heading(quantity, plain)}", _pivot(rows, across, quantity), quantity, plain)
        elif rows:
            _print(console, f"{title}: {name}" if name != title else title, rows, None, plain)
    for note in found["notes"]:
        console.print(f"  {note}", style="dim", markup=False, highlight=False)


def _pivot(rows: Sequence[Row], across: str, quantity: str) -> list[Row]:
    lines = dict[tuple[Any, ...], Row]()
    for row in rows:
        key = tuple(pair for pair in identity(row) if pair[0] != across)
        lines.setdefault(key, dict(key))[f"{row[across]:,}"] = row[quantity]
    return list(lines.values())


def _print(console: Console, title: str, rows: Sequence[Row], quantity: str | None, plain: bool) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", box=None, header_style="dim", padding=(0, 1))
    for key in columns:
        number = any(not isinstance(row.get(key), str) for row in rows)
        table.add_column(key if quantity else heading(key, plain), justify="right" if number else "left")
    for row in rows:
        table.add_row(*("" if key not in row else cell(quantity or key, row[key], plain) for key in columns))
    console.print(table)


def _unit(key: str) -> str | None:
    return next((unit for end, unit in sorted(UNITS.items(), key=lambda e: -len(e[0])) if key.endswith(end)), None)


def heading(key: str, plain: bool = False) -> str:
    """The heading of a column. `plain`: its values are ratios."""
    named = key.replace("_", " ")
    return named if plain else named.replace(" per second", "/s").replace(" bytes", "")


def cell(key: str, value: Any, plain: bool = False) -> str:
    """A value of a column with its unit. `plain`: it is a ratio."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if plain or key.endswith("exponent"):
        return f"{value:.3f}"
    if key.endswith("_share"):
        return f"{value:.0%}"
    if "share" in key:
        return f"{value:.2%}"
    if key == "error":
        return f"{value:.1e}"
    if (unit := _unit(key)) and not key.startswith("tokens"):
        scale, prefix = next(((s, p) for s, p in PREFIXES if abs(value) >= s), (1.0, ""))
        return f"{value / scale:.3g} {prefix}{unit}" if value / scale < 1000 else f"{value / scale:,.0f} {prefix}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
