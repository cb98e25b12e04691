"""The table of losses in two bands of positions: curves of all families and sizes in, a row for each with plain sentences out.

For results; docs/study/study_numbers.py asks for bands and pairs of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from lmu_dist.scaling.bands import (
    Band,
    BandDifference,
    Curves,
    Flat,
    SeedSpread,
    band_difference,
    default_bands,
    flat_from,
    paired_difference,
    seed_spread,
)
from lmu_dist.scaling.pair import PAPER, Pair

WITH_ATTENTION = Pair(PAPER.new, "lmu_attention")  # the pair of the paper's fourth claim


@dataclass(frozen=True, order=True)
class Group:
    """Whose curves are averaged: a family at one size (bin of N), budget and sequence length, both in tokens."""

    family: str
    n_params: int
    sequence_tokens: int
    tokens: int


@dataclass(frozen=True)
class BandRow:
    """By how much the loss of a family falls from one band of positions to a later one, alone and beside another family.

    `paired` is this difference minus that of the family `beside`, on the same text; None if that family has no curve at this
    size, sequence length and budget.
    """

    family: str
    n_params: int
    sequence_tokens: int
    tokens: int
    n_seeds: int
    difference: BandDifference
    flat: Flat
    beside: str | None
    paired: BandDifference | None


def band_rows(groups: Mapping[Group, Curves], pair: Pair, bands: tuple[Band, Band] | None = None) -> tuple[BandRow, ...]:
    """Returns a row for each group, in its order; none for a sequence too short for `bands`, by default `default_bands`.

    Every family is set beside the base of `pair`, the base beside the pair's other family, and the LMU with attention beside
    the LMU. Raises ValueError if the bands overlap or are not in order.
    """
    rows = list[BandRow]()
    lengths = {group.sequence_tokens for group in groups}
    spreads = {n: _spread([curves for group, curves in groups.items() if group.sequence_tokens == n]) for n in lengths}
    for group, curves in groups.items():
        n = group.sequence_tokens
        used = bands or default_bands(n)
        if used is None or used[1].last > n:
            continue
        spread = spreads[n]
        found = groups.get(
            Group(beside := _beside(group, groups, pair), n_params=group.n_params, sequence_tokens=n, tokens=group.tokens)
        )
        paired = paired_difference(curves, found, *used, spread(*used)) if found else None
        difference = band_difference(curves, *used, spread(*used))
        flat = flat_from(curves, spread)
        facts = (group.family, group.n_params, n, group.tokens, len(curves.losses))
        rows.append(BandRow(*facts, difference, flat, beside if found else None, paired))
    return tuple(rows)


def band_sentences(rows: Sequence[BandRow], title: Callable[[str], str]) -> list[str]:
    """Returns sentences about the rows of the largest size of each sequence length; `title` has the names of families."""
    sentences = list[str]()
    for n in sorted({row.sequence_tokens for row in rows}):
        of_length = [row for row in rows if row.sequence_tokens == n]
        largest = [row for row in of_length if row.n_params == max(row.n_params for row in of_length)]
        early, late = largest[0].difference.early, largest[0].difference.late
        where = f"At N = {largest[0].n_params:,}, from positions {early} to positions {late}"
        known = [row for row in largest if row.difference.interval]
        groups = {side: [title(row.family) for row in known if row.difference.side == side] for side in (1, -1, 0)}
        says = {
            1: "the loss falls beyond the noise for",
            -1: "the loss rises beyond the noise for",
            0: "the loss neither falls nor rises beyond the noise for",
        }
        sentences += [f"{where} {says[side]} {', '.join(names)}." for side, names in groups.items() if names]
        sentences += [_paired_sentence(row, title) for row in largest if row.paired and _is_told(row)]
    return sentences


def _is_told(row: BandRow) -> bool:
    """Whether a pair has a sentence: its families differ, or it is that of the paper's fourth claim."""
    assert row.paired is not None
    return row.paired.side != 0 or (row.family, row.beside) == (WITH_ATTENTION.new, WITH_ATTENTION.base)


def _paired_sentence(row: BandRow, title: Callable[[str], str]) -> str:
    assert row.paired is not None
    assert row.beside is not None
    between, value = row.paired, row.paired.value
    how = f"{abs(value):.2g} nats {'more' if value >= 0 else 'less'} than that of {title(row.beside)}"
    if between.interval is None:
        return f"The loss of {title(row.family)} falls by {how}; the noise of this is not known."
    low, high = between.interval
    end = "" if between.side else ", so that the two cannot be told apart"
    return f"The loss of {title(row.family)} falls by {how} (90 %: {low:+.2g} to {high:+.2g}){end}."


def _beside(group: Group, groups: Mapping[Group, Curves], pair: Pair) -> str:
    if group.family == WITH_ATTENTION.new and any(other.family == WITH_ATTENTION.base for other in groups):
        return WITH_ATTENTION.base
    return pair.new if group.family == pair.base else pair.base


def _spread(groups: Sequence[Curves]) -> Callable[[Band, Band], SeedSpread]:
    """The spread of the seeds of curves of one length by bands, each computed once."""
    return cache(lambda early, late: seed_spread(groups, early, late))
