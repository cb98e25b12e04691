"""Turns pydantic's errors into lines for users: the dotted key, what is allowed, what was given, and the fix.

Called by config/load for the configuration, and by models/registry for the keys of a family.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

MOVED = {"train.lmu_form": "model.form"}  # keys of earlier versions, and what they are now
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
MAX_LINES = 10
# The bound of a number or of a length: the words before it, and its name in the context of the error.
BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
# What is allowed, by the type of the error. Strict validation of JSON raises no others, except those handled in `_line`.
ALLOWED = {
    "int_type": "a whole number such as 2000, 1e6 or 10M",
    "int_from_float": "a whole number such as 2000, 1e6 or 10M",
    "int_parsing_size": "a whole number below 2^63",
    "float_type": "a number such as 0.001 or 1e-3",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "mapping_type": "a section of keys and values",
    "dataclass_type": "a section",
}


def explain(error: ValidationError, root: type, prefix: str = "") -> str:
    """One line for each mistake, at most MAX_LINES. `root`: the dataclass that was validated; `prefix`: the key of it."""
    details = [(_path(detail), detail) for detail in error.errors()]
    unknown = {path: _suggestion(path, root) for path, detail in details if detail["type"] in UNKNOWN}
    misspelt = {(*path[:-1], name) for path, name in unknown.items() if name}
    lines = dict.fromkeys(
        _line(path, detail, root, prefix, unknown)
        for path, detail in details
        # A key that is only misspelt is not missing as well.
        if not (detail["type"] == "missing" and path in misspelt)
    )
    shown = list(lines)[:MAX_LINES]
    return "\n".join([*shown, *([f"and {len(lines) - MAX_LINES} more mistakes"] if len(lines) > MAX_LINES else [])])


def dotted(path: Sequence[Any]) -> str:
    """A key as users write it: `ladder.workers[0].n_workers`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return text if text.isprintable() and len(text) <= 200 else repr(text[:200])


def show(value: Any) -> str:
    """What was given, short and in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "a section"
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def known_keys(root: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass, and those of the sections inside it."""
    keys = list[str]()
    for field in dataclasses.fields(root):
        inner = _dataclass_in(_hint(root, field.name))
        keys += [prefix + field.name, *(known_keys(inner, f"{prefix}{field.name}.") if inner else [])]
    return keys


def _path(detail: Any) -> tuple[Any, ...]:
    """Where the mistake is. pydantic also names the validators on the way, in parts such as `function-before[whole(), int]`."""
    return tuple(part for part in detail["loc"] if not str(part).startswith(("function-", "constrained-")))


def _line(path: tuple[Any, ...], detail: Any, root: type, prefix: str, unknown: Mapping[tuple[Any, ...], str]) -> str:
    key, kind, given, context = dotted(path), detail["type"], detail.get("input"), detail.get("ctx") or {}
    key = f"{prefix}.{key}".strip(".") if prefix else key
    if kind == "value_error":
        message = str(context["error"])
    elif kind in UNKNOWN:
        message = _unknown_key(key, path, unknown[path], root, given)
    elif kind == "missing" and isinstance(path[-1], int):  # of a pair
        key, message = dotted(path[:-1]), "must be two values, [low, high]"
    elif kind == "missing":
        message = f"is missing; add it to the section {dotted(path[:-1])}"
    elif kind == "too_long":
        message = f"must be {context['max_length']} values, [low, high], not {context['actual_length']}"
    elif kind == "too_short":
        message = "must not be empty; give a list of one or more values"
    elif kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        message = f"must be {allowed}, not {show(given)}" + _similar(given, allowed.replace(" or ", ", ").split(", "))
    elif kind in BOUNDS:
        words, name = BOUNDS[kind]
        bound = "2^63" if context[name] == 2**63 else f"{context[name]:g}"
        message = f"must be {words} {bound}, not {show(given)}"
    elif kind in ALLOWED:
        message = f"must be {_allowed(kind, path, root)}, not {show(given)}{_hint_for(kind, given, key)}"
    else:
        message = f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, not {show(given)}"
    return f"{key}: {message}" if key else message


def _allowed(kind: str, path: Sequence[Any], root: type) -> str:
    if kind == "tuple_type" and len(path) and path[-1] in ("uniform", "log", "integer", "log_integer"):
        return "two values, [low, high]"
    if kind == "dataclass_type" and (made := _section_at(path, root)) is not None:
        names = [field.name for field in dataclasses.fields(made)]
        also = "a number, or " if "at_n_params" in names else ""  # the rule of a ladder
        return f"{also}a section with keys such as {', '.join(names[:3])}"
    return ALLOWED[kind]


def _hint_for(kind: str, given: Any, key: str) -> str:
    if kind == "string_type" and isinstance(given, int | float):
        return f"; put it in quotes: {key}='\"{str(given).lower()}\"'"
    if kind.startswith(("int", "float")) and isinstance(given, str) and "," in given:
        if re.fullmatch(r"\d{1,3}(,\d{3})+", given):
            return f"; write it without commas: {given.replace(',', '_')}"
        return f"; write a list as [{', '.join(part.strip() for part in given[:60].split(','))}]"
    return ""


def _unknown_key(key: str, path: tuple[Any, ...], name: str, root: type, given: Any) -> str:
    if key in MOVED:
        return f"this key is now {MOVED[key]}"
    if setting := _setting_in_mapping(path, root):
        inner = next(iter(given), "log") if isinstance(given, dict) else "log"
        return f"write a key that has dots in braces: {dotted(path[:-2])}={{{setting}: {{{inner}: ...}}}}"
    if name:
        instead = dotted((*path[:-1], name))
        inner = f", as in {instead}.{next(iter(given))}" if isinstance(given, dict) and given and len(path) == 1 else ""
        return f"unknown key; did you mean {instead}{inner}?"
    elsewhere = [known for known in known_keys(root) if known.split(".")[-1] == path[-1]]
    others = [known for known in known_keys(root) if not key.startswith(f"{known}.")]
    elsewhere = elsewhere or difflib.get_close_matches(key, others, 1, 0.75)
    return f"unknown key; did you mean {elsewhere[0]}?" if elsewhere else "unknown key; docs/configuration.md has all keys"


def _suggestion(path: tuple[Any, ...], root: type) -> str:
    """The key of the same section that is spelt most similarly; "" if none is similar."""
    made = _section_at(path[:-1], root)
    names = [field.name for field in dataclasses.fields(made)] if made else []
    return next(iter(difflib.get_close_matches(str(path[-1]), [*names, *(["include"] if made is root else [])], 1)), "")


def _setting_in_mapping(path: Sequence[Any], root: type) -> str:
    """The setting, such as train.learning_rate, that was split into keys of a mapping such as tune.space; "" if none was."""
    made = _section_at(path[:-2], root) if len(path) > 2 else None
    if made is None or path[-2] in {field.name for field in dataclasses.fields(made)}:
        return ""
    if path[-2] not in {field.name for field in dataclasses.fields(root)}:
        return ""
    return dotted((path[-2], _suggestion(tuple(path[-2:]), root) or path[-1]))


def _similar(given: Any, allowed: Sequence[str]) -> str:
    found = difflib.get_close_matches(given, allowed, 1) if isinstance(given, str) else []
    return f"; did you mean {found[0]}?" if found else ""


def _section_at(path: Sequence[Any], root: type) -> type | None:
    """The dataclass that describes a section; None if there is none. A number is an entry of a list; any other part that is no
    field is a key of a mapping.
    """
    made: type | None = root
    for part in path:
        if made is not None and isinstance(part, str) and part in {field.name for field in dataclasses.fields(made)}:
            made = _dataclass_in(_hint(made, part))
    return made


def _hint(made: type, name: str) -> Any:
    return typing.get_type_hints(made, include_extras=True)[name]


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in a type hint, for example in a list or a mapping of them."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((made for part in typing.get_args(hint) if (made := _dataclass_in(part)) is not None), None)
