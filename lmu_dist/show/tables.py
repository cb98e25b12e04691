"""Tables on stdout, fitted to the terminal, and how values are written in them. Used by the other modules here."""

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

LONG = 500  # rows of a table that is printed plainly
WRAPPED_CHARACTERS = 20  # width of a column whose text is wrapped
TABLE_WIDTH_WITHOUT_TERMINAL = 400  # in characters, for output to a file or a pipe


def new_table(*columns: str) -> Table:
    """Returns an empty table with these columns; columns of numbers are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        words = name in ("family", "cell", "state", "status", "remark", "parameter", "job", "config", "key")
        table.add_column(
            name, justify="left" if words else "right", no_wrap=not words or name in ("family", "cell", "job", "key")
        )
    return table


def fitted_table(names: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str]) -> Table:
    """A table for this terminal. If it is too narrow, columns are left out, the first of `optional` first, as a caption says.

    So what is shown is complete, such as the names of runs.
    """
    widths = {name: max(map(cell_len, column)) for name, *column in zip(names, names, *rows, strict=True)}
    widths |= {name: min(width, WRAPPED_CHARACTERS) for name, width in widths.items() if name == "remark"}
    left_out, kept = list[str](), list(names)
    for name in optional if _result_console().is_terminal else ():
        if sum(widths[kept_name] + 2 for kept_name in kept) - 2 <= _result_console().width:
            break
        kept.remove(name)
        left_out.append(name)
    table = new_table(*kept)
    for row in rows:
        table.add_row(*(value for name, value in zip(names, row, strict=True) if name in kept))
    if left_out:
        table.caption = f"not shown on a terminal of this width: {', '.join(left_out)}"
    return table


def _result_console() -> Console:
    """The console of stdout, which commands may replace."""
    return Console(highlight=False, markup=False, emoji=False)


def print_table(table: Table) -> None:
    """Prints a table as wide as it is where the output is no terminal."""
    if table.row_count > LONG:
        _print_plainly(table)
        return
    out = _result_console()
    Console(highlight=False, markup=False, emoji=False, width=None if out.is_terminal else TABLE_WIDTH_WITHOUT_TERMINAL).print(
        table
    )


def _print_plainly(table: Table) -> None:
    """Prints a table of thousands of rows, for which rich takes seconds. Nothing is wrapped."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    for texts, column in zip(columns, table.columns, strict=True):
        width = max(map(cell_len, texts))
        for i, text in enumerate(texts):
            padding = " " * (width - cell_len(text))
            texts[i] = text + padding if column.justify == "left" else padding + text
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())
    if table.caption:
        print(table.caption)


def number(value: float | None, form: str) -> str:
    """Writes a number by a format; nothing for None, `-` for a value that is not a number."""
    return "" if value is None else "-" if math.isnan(value) else format(value, form)


def duration(seconds: float | None) -> str:
    """Writes a duration with its unit; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def size(n_bytes: int) -> str:
    """Writes a size with its unit."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 50_000 else f"{n_bytes / 1e3:,.1f} kB"
