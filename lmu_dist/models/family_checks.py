"""Checks of a family class before it is used: is it complete, causal, and a file of its own? Called by models/registry."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import torch

from lmu_dist.config.types import ConfigError
from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape
from lmu_dist.records import LINES, MARKERS

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
USER_MODULE = "lmu_dist_user_family"  # name of the module of every user's file


def family_from_class(value: Any, reference: str) -> Family:
    """Checks that a value is a complete family class. Returns its instance. Raises ConfigError."""
    if not (inspect.isclass(value) and issubclass(value, Family)):
        raise ConfigError(f"family {reference} is not a class derived from lmu_dist.models.family.Family; see docs/families.md")
    if inspect.isabstract(value):
        raise ConfigError(
            f"family {reference} does not define {', '.join(sorted(value.__abstractmethods__))}; see docs/families.md"
        )
    if not NAME.fullmatch(value.name):
        raise ConfigError(f"family {reference}: its name {value.name!r} must be lower-case letters, digits and _, at most 40")
    for colour in filter(None, (value.colour, value.colour_dark)):
        if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
            raise ConfigError(f"family {reference}: its colour {colour!r} must be of the form #rrggbb")
    if (value.marker and value.marker not in MARKERS) or value.line not in LINES:
        raise ConfigError(
            f"family {reference}: its marker {value.marker!r} must be one of {' '.join(MARKERS)}, its line {value.line!r} "
            f"one of {' '.join(LINES)}"
        )
    if not value.version and value.__module__ != USER_MODULE:
        raise ConfigError(f"family {reference} has no version; set `version = 1` in the class")
    return value()


def check_sublayers(family: Family, reference: str) -> None:
    """Runs every sublayer on a small random input. Raises ConfigError if one changes the shape or is not causal."""
    length, options = 8, family.Options()
    found = next(((d, w) for d in range(8, 264) if (w := family.widths(d, length, options)) is not None), None)
    if found is None:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        shape = Shape(family.name, found[0], 1, length, 16, found[1])
        if not isinstance(made := family.mixer(shape, options), torch.nn.Module):
            raise ConfigError(f"family {reference}: mixer() returned {type(made).__name__}, not a torch.nn.Module")
        x = torch.randn(2, length, found[0])
        changed = x.clone()
        changed[:, -1] += 1.0
        for sublayer in family.sublayers(shape, options):
            name = type(sublayer).__name__
            try:
                y, after = sublayer.eval()(x), sublayer(changed)
            except Exception:  # noqa: BLE001 - it may need a GPU; errors on every device are reported by the counts
                continue
            if not isinstance(y, torch.Tensor) or y.shape != x.shape:
                given = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
                raise ConfigError(
                    f"family {reference}: {name} returns {given} for an input of {tuple(x.shape)}; keep the shape"
                )
            if bool((y - after)[:, :-1].abs().max() > 1e-5 * y.abs().max()):
                raise ConfigError(
                    f"family {reference}: the output of {name} at a position depends on a later input; it must be causal"
                )


def check_imports(text: str, path: Path, reference: str) -> None:
    """Raises ConfigError if a user's file imports other files next to it: only its own text reaches workers and its version."""
    for node in ast.walk(ast.parse(text)):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in {name.partition(".")[0] for name in imported}:
            if (path.parent / f"{name}.py").exists() or (path.parent / name / "__init__.py").exists():
                found = importlib.util.find_spec(name)
                if found is None or not found.origin or Path(found.origin).parent in (path.parent, path.parent / name):
                    raise ConfigError(
                        f"family {reference} imports {name}, a file next to it, which would not reach the workers; "
                        "put its code into the family's file, or install it as a package"
                    )
