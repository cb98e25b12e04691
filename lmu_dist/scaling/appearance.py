"""How a report shows families: title, colour, marker, order; from the tags of runs, else from the families. For collect."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle

from lmu_dist.models import registry
from lmu_dist.records import LINES, MARKERS, Appearance, known_fields

FREE_COLOURS = (
    ("#6b5b00", "#d8c75a"),
    ("#5b4bb7", "#a99cf0"),
    ("#00707a", "#4cc3cf"),
    ("#8a3324", "#e08a78"),
    ("#4d5560", "#b6bfc9"),
)
COLOUR = "(#[0-9a-f]{6})?"  # what may stand in the page's CSS
FREE_MARKERS = ("v", "P", "X", "*", "<", ">", "h")


def title(family: str) -> str:
    """Returns the title of a built-in or installed family, or else its name; Study.title also knows titles stored with runs."""
    return registry.find(family).appearance().title if family in registry.names() else family.replace("_", " ")


def family_order(family: str) -> tuple[int, str]:
    """Returns a sort key: built-in families in their own order, then installed ones, then others by name."""
    known = registry.names()
    return (known.index(family) if family in known else len(known), family)


def stored_appearance(family: str, stored: str | None) -> Appearance:
    """Returns the appearance stored with a run, or, if none is stored, that of the family."""
    if stored:
        look = Appearance(**known_fields(Appearance, json.loads(stored)))
        drawable = look.marker in ("", *MARKERS) and look.line in LINES
        drawable = drawable and all(re.fullmatch(COLOUR, colour) for colour in (look.colour, look.colour_dark))
        return look if drawable else Appearance(look.title)
    return registry.find(family).appearance() if family in registry.names() else Appearance(title(family))


def fill_in_colours_and_markers(appearances: Mapping[str, Appearance]) -> dict[str, Appearance]:
    """Returns the appearances, with a free colour and marker for every family that defines none."""
    found = dict[str, Appearance]()
    taken = {look.colour for look in appearances.values()}, {look.marker for look in appearances.values()}
    colours = [pair for pair in FREE_COLOURS if pair[0] not in taken[0]] or FREE_COLOURS
    markers = [marker for marker in FREE_MARKERS if marker not in taken[1]] or FREE_MARKERS
    free = zip(cycle(colours), cycle(markers), strict=False)
    for family, own in appearances.items():
        (colour, dark), marker = ((own.colour, own.colour_dark), own.marker) if own.colour and own.marker else next(free)
        found[family] = replace(
            own, colour=own.colour or colour, colour_dark=own.colour_dark or own.colour or dark, marker=own.marker or marker
        )
    return found
