"""Reads the numbers of a table's column as people write them: cells in, floats out, or what the cell is instead.

Cells are texts such as `18.9M`, `1,234,567`, `4,61` or `diverged`, or numbers of a file that has types. Which of `.` and `,` is
the decimal mark is decided for a column as a whole. Called by scaling/read_table.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Mark = Literal[".", ","]  # the decimal mark
Kind = Literal["number", "missing", "not finite", "word"]
MARKS: tuple[Mark, Mark] = (".", ",")

MISSING = {
    "",
    "-",
    "--",
    "---",
    "\u2013",
    "\u2014",
    ".",
    "..",
    "...",
    "?",
    "na",
    "n/a",
    "n.a.",
    "<na>",
    "null",
    "none",
    "nil",
    "#n/a",
}
NOT_FINITE = {
    "nan",
    "-nan",
    "inf",
    "+inf",
    "-inf",
    "infinity",
    "+infinity",
    "-infinity",
    "\u221e",
    "-\u221e",
    "#div/0!",
    "#num!",
}
# States that people and schedulers write where a number is not there: they do not show that a column is the wrong one.
STATES = re.compile(
    r"(diverg|blew|explod|oom|out of mem|fail|crash|kill|running|pending|queued|todo|tbd|wip|error|timeout|timed out|preempt|"
    r"cancel|abort|stopp|skip|missing|unknown|lost|not |in progress|incomplete|x+$|#)",
    re.IGNORECASE,
)
SCALES = {
    **dict.fromkeys(("k", "thousand", "thousands"), 1e3),
    **dict.fromkeys(("m", "mn", "mio", "mil", "million", "millions"), 1e6),
    **dict.fromkeys(("b", "g", "bn", "bil", "mrd", "billion", "billions"), 1e9),
    **dict.fromkeys(("t", "tn", "trillion", "trillions"), 1e12),
}
_UNIT = r"(?:params?|parameters?|tok(?:en)?s?|nats?(?:\s*(?:/|per)\s*tok(?:en)?)?)"
_SCALE = "|".join(sorted(SCALES, key=len, reverse=True))
_UNIT_TEXT = re.compile(rf"(?:in\s+)?(?P<scale>{_SCALE})?(?:\s*of)?\s*(?P<unit>{_UNIT})?", re.IGNORECASE)
_NUMBER = re.compile(
    r"[~\u2248]?\s*(?P<sign>[+-]?)\s*(?P<digits>(?:\d[\d.,' _]*)?[.,]?\d[.,]?)"
    r"(?:\s*(?:e\s*|[x\u00d7*\u00b7]\s*10\s*(?:\^|\*\*)?\s*)\(?(?P<exponent>[+-]?\d+)\)?)?"
    rf"\s*(?P<scale>{_SCALE})?\s*{_UNIT}?",
    re.IGNORECASE,
)
_SIMPLE = re.compile(r"\d{1,40}(\.\d{0,2}|\.\d{4,40})?")  # as most cells are; not 1.234, which may be 1234
_AROUND = re.compile(r"^[\s\"'=]+|\s+#.*$|[\s\"']+$")  # quotation marks, what Excel puts before texts, and comments
_POWER = re.compile(r"(\d+)\s*(?:\^|\*\*)\s*(-?\d+)")
_SUPERSCRIPT = re.compile(r"[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_FROM_SUPERSCRIPT = str.maketrans("\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "-0123456789")
# Spaces of typography, the minus sign, and apostrophes as thousands separators.
_PLAIN = str.maketrans(dict.fromkeys("\u00a0\u202f\u2009\u2007\t", " ") | {"\u2212": "-", "\u2019": "'", "\u02bc": "'"})


def _mantissa(mark: Mark) -> re.Pattern[str]:
    other = "," if mark == "." else "."
    separator = f"[{re.escape(other)}' _]"
    grouped = rf"[1-9]\d{{0,2}}(?P<s>{separator})\d{{3}}(?:(?P=s)\d{{3}})*"
    by_lakh = rf"[1-9]\d?(?:{re.escape(other)}\d\d)+{re.escape(other)}\d{{3}}"  # as in 1,23,45,678
    return re.compile(rf"(?:{grouped}|{by_lakh}|\d+)(?:{re.escape(mark)}\d*)?|{re.escape(mark)}\d+")


_MANTISSAS: dict[Mark, re.Pattern[str]] = {mark: _mantissa(mark) for mark in MARKS}


@dataclass(frozen=True)
class Cell:
    """What a cell is. `by_mark` has its value under each decimal mark under which it is a number."""

    text: str
    kind: Kind
    by_mark: dict[Mark, float]

    @property
    def is_ambiguous(self) -> bool:
        """Whether the two decimal marks give two values, as for 1,234."""
        return len(set(self.by_mark.values())) > 1


def cell_text(value: Any) -> str:
    """Returns a cell as the text that conditions and messages have: numbers in full, "" for a missing one, true and false."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "" if value != value else format(value, ".15g")  # an empty cell of a table with types is nan
    return str(value).strip()


def parse_cell(value: Any) -> Cell:
    """Returns what a cell is: a number under one or both decimal marks, missing, not finite, or a word."""
    text = cell_text(value)
    if not isinstance(value, str | bool) and value is not None:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return Cell(text, "word", {})
        if number != number or abs(number) == float("inf"):
            return Cell(text or "nan", "not finite", {})
        return Cell(text, "number", dict.fromkeys(MARKS, number))
    if simple := _SIMPLE.fullmatch(text):
        return Cell(text, "number", {".": float(text)} if simple[1] else dict.fromkeys(MARKS, float(text)))
    plain = _AROUND.sub("", text.translate(_PLAIN))
    if plain.lower() in MISSING:
        return Cell(text, "missing", {})
    if plain.lower() in NOT_FINITE:
        return Cell(text, "not finite", {})
    by_mark = _values(_SUPERSCRIPT.sub(lambda m: "^" + m[0].translate(_FROM_SUPERSCRIPT), plain))
    if any(abs(number) == float("inf") for number in by_mark.values()):
        return Cell(text, "not finite", {})
    return Cell(text, "number" if by_mark else "word", by_mark)


def _values(text: str) -> dict[Mark, float]:
    if power := _POWER.fullmatch(text):
        try:
            return dict.fromkeys(MARKS, float(power[1]) ** int(power[2]))
        except (OverflowError, ZeroDivisionError):
            return {}
    parts = _NUMBER.fullmatch(text)
    if not parts:
        return {}
    scale, values = SCALES.get((parts["scale"] or "").lower(), 1.0), dict[Mark, float]()
    for mark, pattern in _MANTISSAS.items():
        if found := pattern.fullmatch(parts["digits"]):
            other = "," if mark == "." else "."
            digits = re.sub(rf"[{re.escape(other)}' _]", "", found[0]).replace(mark, ".")
            value = float(f"{parts['sign']}{digits}e{parts['exponent'] or 0}") * scale
            values[mark] = round(value) if scale > 1 and abs(value - round(value)) < 1e-6 * abs(value) < 1e9 else value
    return values


@dataclass(frozen=True)
class MarkEvidence:
    """What the numbers of a column say about its decimal mark. The texts are examples for messages, "" if there is none.

    `possible` has the marks under which all numbers of the column can be read.
    """

    possible: tuple[Mark, ...]
    ambiguous: str
    only: dict[Mark, str]  # numbers that only one mark explains

    @property
    def decided(self) -> Mark | None:
        """The mark that the column shows by itself; None if it shows none."""
        return self.possible[0] if len(self.possible) == 1 else None


def mark_evidence(cells: Sequence[Cell]) -> MarkEvidence:
    """Returns what the numbers of a column say about its decimal mark."""
    numbers = [cell for cell in cells if cell.kind == "number"]
    ambiguous = next((cell.text for cell in numbers if cell.is_ambiguous), "")
    only: dict[Mark, str] = {mark: next((cell.text for cell in numbers if set(cell.by_mark) == {mark}), "") for mark in MARKS}
    possible: tuple[Mark, ...] = tuple(mark for mark in MARKS if not any(text for other, text in only.items() if other != mark))
    return MarkEvidence(possible, ambiguous, {mark: text for mark, text in only.items() if text})


def is_state(text: str) -> bool:
    """Whether a word in a column of numbers is the state of a run, such as diverged or OOM."""
    return STATES.match(text) is not None


def unit_scale(text: str) -> float | None:
    """Returns by what a unit multiplies, as 1e6 for "M", "(millions)" or "M params", 1 for "nats"; None if it is no unit."""
    parts = _UNIT_TEXT.fullmatch(text.strip().strip("()[]").strip())
    return SCALES.get((parts["scale"] or "").lower(), 1.0) if parts and (parts["scale"] or parts["unit"]) else None
