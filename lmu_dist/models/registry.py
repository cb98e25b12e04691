"""Finds families by reference: built-in ones, those of installed packages, and those in users' files.

A reference is the value of `model.family` in a configuration: a name, or path/to/file.py:CLASS. The driver reads a user's file
once. Workers receive its text (`FamilySource`) and `register` it, so the path does not have to exist on them.
"""

import difflib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from lmu_dist.config.types import ConfigError
from lmu_dist.models import families as built_in_families
from lmu_dist.models.family import Family
from lmu_dist.models.family_checks import USER_MODULE, check_imports, check_sublayers, family_from_class
from lmu_dist.models.family_options import option_names as option_names
from lmu_dist.models.family_options import options_of as options_of
from lmu_dist.models.family_source import FamilySource
from lmu_dist.models.shape import Shape

ENTRY_POINTS = "lmu_dist.families"
FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")
_user_families: dict[str, tuple[FamilySource, Family]] = {}  # by reference; of this process


def find(reference: str) -> Family:
    """The family of a reference. Raises ConfigError with the known names if there is none."""
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
    similar = difflib.get_close_matches(reference, names(), 1)
    hint = f"did you mean {similar[0]}? Known are" if similar else "take one of"
    raise ConfigError(f"unknown family {reference!r}; {hint} {', '.join(names())}, or path/to/file.py:CLASS")


def names() -> tuple[str, ...]:
    """Names of all built-in families, in the order of reports, and then of all families of installed packages."""
    return (*built_in(), *sorted(set(_installed()) - set(built_in())))


def is_file_reference(reference: str) -> bool:
    """Whether a reference has the form path/to/file.py:CLASS."""
    return FILE.fullmatch(reference) is not None


def read_source(reference: str) -> FamilySource:
    """Reads the file of a reference. Raises ConfigError if it cannot be read."""
    match = FILE.fullmatch(reference)
    assert match is not None
    path = Path(os.path.abspath(Path(match["path"]).expanduser()))
    try:
        return FamilySource(f"{path}:{match['name']}", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"family {reference}: cannot read {path}: {reason}; give the path of a Python file") from e


def sources(references: set[str]) -> tuple[FamilySource, ...]:
    """The texts of those families that are in users' files. Other processes pass them to `register`."""
    files = sorted(reference for reference in references if is_file_reference(reference))
    return tuple(_user_families[key][0] if (key := absolute_reference(r)) in _user_families else read_source(r) for r in files)


def absolute_reference(reference: str) -> str:
    """The reference with an absolute path. It does not depend on the working directory."""
    match = FILE.fullmatch(reference)
    return reference if match is None else f"{os.path.abspath(Path(match['path']).expanduser())}:{match['name']}"


def register(source: FamilySource) -> Family:
    """Executes a user's file and registers its family in this process, by reference and by name. Raises ConfigError."""
    if (known := _user_families.get(source.reference)) is not None and known[0] == source:
        return known[1]
    loaded = getattr(_execute(source), source.reference.rpartition(":")[2], None)
    family = family_from_class(loaded, source.reference)
    if type(family).__module__ != USER_MODULE:
        raise ConfigError(
            f"family {source.reference}: the class is imported, not defined in this file; name the file that has it"
        )
    for other_source, other_family in _user_families.values():
        if other_family.name == family.name and other_source.reference != source.reference:
            raise ConfigError(
                f"the families {other_source.reference} and {source.reference} have the same name {family.name}; "
                "set another `name` in one of the classes"
            )
    if _is_taken(family.name):
        raise ConfigError(f"family {source.reference}: the name {family.name!r} is taken; set another `name` in the class")
    check_sublayers(family, source.reference)
    # A class that is derived from a family of the package changes with it.
    bases = [f"{base.name}:{base.version}" for base in type(family).__mro__[1:] if issubclass(base, Family) and base.version]
    type(family).version = "+".join([source.digest, *bases])
    _user_families[source.reference] = source, family
    return family


def source_of(family: Family) -> FamilySource | None:
    """The text of a family in a user's file; None for other families."""
    return next((source for source, known in _user_families.values() if known is family), None)


def version_of(family: Family, values: Mapping[str, Any]) -> str:
    """The version of a family with its keys under `model`, for keys and records. Raises ConfigError as `options_of` does."""
    return family.version_with(options_of(family, values))


def family_of(shape: Shape) -> Family:
    """The family of a shape. A family in a user's file must have been registered in this process."""
    return find(shape.family)


@cache
def built_in() -> dict[str, Family]:
    """The families of models/families, by name."""
    built = dict[str, Family]()
    for module in pkgutil.iter_modules(built_in_families.__path__):
        loaded = import_module(f"{built_in_families.__name__}.{module.name}")
        classes = [value for value in vars(loaded).values() if inspect.isclass(value) and issubclass(value, Family)]
        for value in classes:
            if value.__module__ == loaded.__name__ and not (inspect.isabstract(value) or value.__name__.startswith("_")):
                built[value.name] = family_from_class(value, f"{value.__module__}:{value.__name__}")
    return dict(sorted(built.items(), key=lambda item: (item[1].report_rank, item[0])))


@cache
def _installed() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _load_installed(name: str) -> Family:
    point = _installed()[name]
    try:
        loaded = point.load()
    except Exception as e:
        raise ConfigError(
            f"family {name}: {point.value} of an installed package cannot be loaded: {type(e).__name__}: {e}"
        ) from e
    family = family_from_class(loaded, point.value)
    if family.name != name:
        raise ConfigError(
            f"family {name}: the class {point.value} has the name {family.name}; the entry point must have the same name"
        )
    return family


def _is_taken(name: str) -> bool:
    return name in built_in() or name in _installed()


def _execute(source: FamilySource) -> ModuleType:
    module = ModuleType(USER_MODULE)
    module.__file__ = str(source.path)
    sys.modules[module.__name__] = module  # dataclasses look the module up there
    try:
        check_imports(source.text, source.path, source.reference)
        exec(compile(source.text, str(source.path), "exec"), module.__dict__)
    except ConfigError:
        raise
    except Exception as e:
        line = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
        raise ConfigError(f"family {source.reference}: the file cannot be run{line}: {type(e).__name__}: {e}") from e
    return module
