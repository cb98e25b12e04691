"""Runtime checks of the type annotations of lmu_dist, in tests only. Called by conftest before lmu_dist is imported.

jaxtyping checks the modules that annotate shapes: it binds the names of dimensions in every call, which takes many times as
long as the check of types. Beartype alone checks all other modules. An int is accepted as a float.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.claw import beartype_package
from jaxtyping import install_import_hook
from numpy.typing import ArrayLike

ROOT = Path(__file__).parents[1]
# ArrayLike is a union of protocols, which take longer to check than a law takes to compute.
NUMBERS = np.ndarray | np.number | float | Sequence
CONF = BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({ArrayLike: NUMBERS, ArrayLike | None: NUMBERS | None}))
check = beartype(conf=CONF)


def modules_for_jaxtyping() -> list[str]:
    """Names of the modules with shapes, and of those that beartype cannot take, which jaxtyping leaves unchecked.

    Their annotations name types that are imported for type checkers only, or stand in quotes in Ray's ActorProxy; or they have
    kernels of Triton, objects of which beartype would make methods.
    """
    paths = sorted((ROOT / "lmu_dist").rglob("*.py"))
    found = [path for path in paths if re.search("array_types|TYPE_CHECKING|ActorProxy|triton.jit", path.read_text())]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def install() -> None:
    """Checks every call of the functions and dataclasses of lmu_dist's modules that are imported from now on."""
    beartype_package("lmu_dist", conf=CONF)
    install_import_hook(modules_for_jaxtyping(), "typecheck.check")
