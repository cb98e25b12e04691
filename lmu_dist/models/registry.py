"""Where families are found by name: built in, of an installed package, or in a user's own file. References in, families out.

A reference is what a configuration says: a name, or path/to/file.py:CLASS. A user's file is read once, on the driver; workers
get its text (`FamilySource`) and `register` it, so no path has to exist on them. Called by whoever needs a family.
"""

import difflib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lmu_dist.config.load import COMMON_MODEL_KEYS
from lmu_dist.config.types import ConfigError
from lmu_dist.models import families as built_in_families
from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape

ENTRY_POINTS = "lmu_dist.families"
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")
_user_families: dict[str, tuple["FamilySource", Family]] = {}  # families of users' files in this process, by reference


@dataclass(frozen=True)
class FamilySource:
    """A user's family as text, for processes that do not see the file."""

    reference: str  # absolute path:CLASS
    text: str

    @property
    def path(self) -> Path:
        """The file on the machine where it was read."""
        return Path(self.reference.rpartition(":")[0])

    @property
    def digest(self) -> str:
        """The family's version."""
        return sha256(self.text.encode()).hexdigest()[:12]


def find(reference: str) -> Family:
    """The family of that name, or in that file. Raises ConfigError that names those there are."""
    if is_file_reference(reference):
        known = _user_families.get(absolute_reference(reference))
        return known[1] if known else register(read_source(reference))
    if reference in (families := built_in()):
        return families[reference]
    if reference in _installed():
        return _load_installed(reference)
    for _, family in _user_families.values():
        if reference == family.name:
            return family
    near = difflib.get_close_matches(reference, names(), 1)
    hint = f"did you mean {near[0]}? There are" if near else "take one of"
    raise ConfigError(f"unknown family {reference!r}; {hint} {', '.join(names())}, or path/to/file.py:CLASS")


def names() -> tuple[str, ...]:
    """All families that can be named without a file: the built-in ones in the order of reports, then installed ones."""
    return (*built_in(), *sorted(set(_installed()) - set(built_in())))


def is_file_reference(reference: str) -> bool:
    """Whether a reference names a class in a file."""
    return FILE.fullmatch(reference) is not None


def read_source(reference: str) -> FamilySource:
    """The text of a user's family. Raises ConfigError if the file cannot be read."""
    match = FILE.fullmatch(reference)
    assert match is not None
    path = Path(match["path"]).expanduser().absolute()
    try:
        return FamilySource(f"{path}:{match['name']}", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"family {reference}: cannot read {path}: {reason}; give the path of a Python file") from e


def sources(references: set[str]) -> tuple[FamilySource, ...]:
    """The texts of those families that are users' own, for `register` in other processes."""
    own = sorted(reference for reference in references if is_file_reference(reference))
    return tuple(_user_families[key][0] if (key := absolute_reference(r)) in _user_families else read_source(r) for r in own)


def absolute_reference(reference: str) -> str:
    """A reference that means the same in every folder of this machine."""
    match = FILE.fullmatch(reference)
    return reference if match is None else f"{Path(match['path']).expanduser().absolute()}:{match['name']}"


def register(source: FamilySource) -> Family:
    """Runs a user's file and makes its family known in this process, by reference and by name. Raises ConfigError."""
    if (known := _user_families.get(source.reference)) is not None and known[0] == source:
        return known[1]
    family = _from_class(getattr(_run(source), source.reference.rpartition(":")[2], None), source.reference)
    type(family).version = source.digest
    for other, namesake in _user_families.values():
        if namesake.name == family.name and other.reference != source.reference:
            raise ConfigError(f"{other.reference} and {source.reference} are both called {family.name}; give one another name")
    if _is_known(family.name):
        raise ConfigError(f"family {source.reference}: the name {family.name!r} is taken; set another `name` in the class")
    _user_families[source.reference] = source, family
    return family


def options_of(family: Family, values: Mapping[str, Any]) -> Any:
    """The family's options from the keys under `model` that are not those of every family. Raises ConfigError."""
    known = option_names(family)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *COMMON_MODEL_KEYS], 1)
            own = f"its own keys are {', '.join(known)}" if known else "it has no keys of its own"
            raise ConfigError(
                f"model.{key}: unknown key of family {family.name}; {f'did you mean model.{near[0]}?' if near else own}"
            )
    try:
        return TypeAdapter(family.Options).validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(["model", *map(str, error["loc"])])
        raise ConfigError(f"{key}: {error['msg'][:1].lower()}{error['msg'][1:]} (got {error['input']!r})") from e


def option_names(family: Family) -> tuple[str, ...]:
    """Keys that a family has under `model`."""
    return tuple(f.name for f in fields(family.Options))


def family_of(shape: Shape) -> Family:
    """The family of a shape; a user's own must have been registered in this process."""
    return find(shape.family)


@cache
def built_in() -> dict[str, Family]:
    """The families of models/families, by name."""
    found = dict[str, Family]()
    for module in pkgutil.iter_modules(built_in_families.__path__):
        loaded = import_module(f"{built_in_families.__name__}.{module.name}")
        for made in vars(loaded).values():
            if inspect.isclass(made) and issubclass(made, Family) and made.__module__ == loaded.__name__:
                found[made.name] = _from_class(made, f"{made.__module__}:{made.__name__}")
    return dict(sorted(found.items(), key=lambda item: (item[1].report_rank, item[0])))


@cache
def _installed() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _load_installed(name: str) -> Family:
    point = _installed()[name]
    try:
        made = point.load()
    except Exception as e:
        raise ConfigError(
            f"family {name}: {point.value} of an installed package cannot be loaded: {type(e).__name__}: {e}"
        ) from e
    family = _from_class(made, point.value)
    if family.name != name:
        raise ConfigError(f"family {name}: {point.value} calls itself {family.name}; the entry point must have the same name")
    return family


def _is_known(name: str) -> bool:
    return name in built_in() or name in _installed()


def _run(source: FamilySource) -> ModuleType:
    module = ModuleType(f"lmu_dist_family_{source.digest}")
    module.__file__ = str(source.path)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(compile(source.text, str(source.path), "exec"), module.__dict__)
    except Exception as e:
        sys.modules.pop(module.__name__)
        line = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
        raise ConfigError(f"family {source.reference}: the file cannot be run{line}: {type(e).__name__}: {e}") from e
    return module


def _from_class(made: Any, reference: str) -> Family:
    if not (inspect.isclass(made) and issubclass(made, Family)):
        raise ConfigError(f"family {reference} is no class derived from lmu_dist.models.family.Family; see docs/families.md")
    if inspect.isabstract(made):
        raise ConfigError(f"family {reference} lacks {', '.join(sorted(made.__abstractmethods__))}; see docs/families.md")
    if not NAME.fullmatch(made.name):
        raise ConfigError(f"family {reference}: its name {made.name!r} must be lower-case letters, digits and _, at most 40")
    for colour in filter(None, (made.colour, made.colour_dark)):
        if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
            raise ConfigError(f"family {reference}: its colour {colour!r} must be of the form #rrggbb")
    return made()
