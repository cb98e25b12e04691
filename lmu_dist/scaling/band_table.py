"""The table of losses in two bands of positions: curves of all families and sizes in, a row for each with plain sentences out.

For results; docs/study/study_numbers.py asks for bands and pairs of its own.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """The fall of a family's loss from one band of positions to a later one, and how it differs from that of another family.

    `paired` is this fall minus that of the family `reference`, on the same text; None if that family has no curve at this
    size, sequence length and budget.
    """

    family: str
    n_params: int
    sequence_tokens: int
    tokens: int
    n_seeds: int
    difference: BandDifference
    flat: Flat
    reference: str | None
    paired: BandDifference | None


def band_rows(groups: Mapping[Group, Curves], pair: Pair, bands: tuple[Band, Band] | None = None) -> tuple[BandRow, ...]:
    """Returns a row for each group, in its order; none for a sequence too short for `bands`, by default `default_bands`.

    Every family is compared with the base of `pair`, the base with the pair's other family, and the LMU with attention with
    the LMU, or with the base of `pair` where the LMU has no curve at this size, sequence length and budget.
    Raises ValueError if the bands overlap or are not in order.
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
        reference = _reference(group, groups, pair)
        found = groups.get(replace(group, family=reference))
        paired = paired_difference(curves, found, *used, spread(*used)) if found else None
        difference = band_difference(curves, *used, spread(*used))
        flat = flat_from(curves, spread)
        facts = (group.family, group.n_params, n, group.tokens, len(curves.losses))
        rows.append(BandRow(*facts, difference, flat, reference if found else None, paired))
    return tuple(rows)


def band_sentences(rows: Sequence[BandRow], title: Callable[[str], str]) -> list[str]:
    """Returns sentences about every family, and every pair, at its largest size at each sequence length.

    Families that end at another size or budget have a sentence of their own. `title` has the names of families.
    """
    sentences = list[str]()
    for n in sorted({row.sequence_tokens for row in rows}):
        of_length = [row for row in rows if row.sequence_tokens == n]
        alone = _largest(of_length, lambda row: row.family)
        pairs = _largest([row for row in of_length if row.paired], lambda row: (row.family, row.reference))
        for place in sorted({_place(row) for row in (*alone, *pairs)}, reverse=True):
            sentences += _sentences_alone([row for row in alone if _place(row) == place], title)
            sentences += [_paired_sentence(row, title) for row in pairs if _place(row) == place and _has_sentence(row)]
    return sentences


def _place(row: BandRow) -> tuple[int, int]:
    return row.n_params, row.tokens


def _largest(rows: Sequence[BandRow], key: Callable[[BandRow], Hashable]) -> list[BandRow]:
    """The rows with the largest size, then budget, of those with the same key, in the order of `rows`."""
    places = dict[Hashable, tuple[int, int]]()
    for row in rows:
        places[key(row)] = max(places.get(key(row), (0, 0)), _place(row))
    return [row for row in rows if places[key(row)] == _place(row)]


def _sentences_alone(rows: Sequence[BandRow], title: Callable[[str], str]) -> list[str]:
    """Sentences about rows of one size, budget and sequence length."""
    known = [row for row in rows if row.difference.interval]
    says = {
        1: "the loss falls beyond the noise for",
        -1: "the loss rises beyond the noise for",
        0: "the loss neither falls nor rises beyond the noise for",
    }
    sentences = list[str]()
    for side, verb in says.items():
        found = [row for row in known if row.difference.side == side]
        if found:
            bands = f"from positions {found[0].difference.early} to positions {found[0].difference.late}"
            sentences.append(f"{_where(found[0])}, {bands} {verb} {', '.join(title(row.family) for row in found)}.")
    return sentences


def _where(row: BandRow) -> str:
    return f"At N = {row.n_params:,} and {row.tokens:,} tokens of training"


def _has_sentence(row: BandRow) -> bool:
    """Whether a pair has a sentence: its families differ, or it is that of the paper's fourth claim."""
    assert row.paired is not None
    return row.paired.side != 0 or (row.family, row.reference) == (WITH_ATTENTION.new, WITH_ATTENTION.base)


def _paired_sentence(row: BandRow, title: Callable[[str], str]) -> str:
    assert row.paired is not None
    assert row.reference is not None
    between, value = row.paired, row.paired.value
    how = f"{abs(value):.2g} nats {'more' if value >= 0 else 'less'} than that of {title(row.reference)}"
    falls = f"{_where(row)} the loss of {title(row.family)} falls by {how}"
    if between.interval is None:
        return f"{falls}; the noise of this is not known."
    low, high = between.interval
    end = "" if between.side else ", so that the two cannot be told apart"
    return f"{falls} (90 %: {low:+.2g} to {high:+.2g}){end}."


def _reference(group: Group, groups: Mapping[Group, Curves], pair: Pair) -> str:
    if group.family == WITH_ATTENTION.new and replace(group, family=WITH_ATTENTION.base) in groups:
        return WITH_ATTENTION.base
    return pair.new if group.family == pair.base else pair.base


def _spread(groups: Sequence[Curves]) -> Callable[[Band, Band], SeedSpread]:
    """The spread of the seeds of curves of one length by bands, each computed once."""
    return cache(lambda early, late: seed_spread(groups, early, late))
