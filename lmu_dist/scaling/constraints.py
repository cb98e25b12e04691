"""Parameters of a law that a fit holds at a value or ties to each other: --fix and --tie of `lmu-dist fit`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.scaling.laws import Floats, Law, ScalingLaw, parameter_names, unitless_names


@dataclass(frozen=True)
class Constraints:
    """`held` parameters keep a value, both parameters of a pair in `ties` have the same one.

    Only parameters without units can be constrained: E and exponents, but not prefactors.
    """

    held: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[tuple[str, str], ...] = ()

    def check(self, form: type[ScalingLaw]) -> None:
        """Raises ConfigError if the law has no such parameter, or it has a unit."""
        allowed = unitless_names(form)
        for option, names in (("--fix", [*self.held]), ("--tie", [name for pair in self.ties for name in pair])):
            for name in names:
                if name not in allowed:
                    known = ", ".join(allowed) or "none"
                    raise ConfigError(f"{option} {name}: {form.__name__.lower()} has these parameters without units: {known}")
        for first, second in self.ties:
            if (first in form.LOG_PARAMETERS) != (second in form.LOG_PARAMETERS):
                raise ConfigError(f"--tie {first}={second}: these parameters cannot be equal")

    def names(self) -> set[str]:
        """Returns the names of the held parameters, also of those that are tied to a held one."""
        return set(self._all_held())

    def holding(self, name: str, value: float) -> "Constraints":
        """Returns these constraints and a further held parameter."""
        return replace(self, held={**self.held, name: value})

    def apply(self, law: Law) -> Law:
        """Returns a law that meets the constraints; of tied parameters the first gives the value."""
        values = {second: getattr(law, first) for first, second in self.ties}
        return replace(law, **{**values, **self._all_held()})  # pyright: ignore

    def basis(self, form: type[ScalingLaw], with_kink: bool = False) -> Floats:
        """Returns the directions (free, parameters) in which the coordinates of a law may change.

        A parameter at which the law has a kink is searched on a grid, so it is left out for minimisers.
        """
        names, held = parameter_names(form), self.names()
        followers = {second: first for first, second in self.ties}
        rows = list[Floats]()
        for name in names:
            if name in held or name in followers or (name == form.KINK and not with_kink):
                continue
            rows.append(np.array([1.0 if other == name or followers.get(other) == name else 0.0 for other in names]))
        return np.array(rows)

    def n_free(self, form: type[ScalingLaw]) -> int:
        """Returns the number of parameters that are fitted: the degrees of freedom that the fit takes from the runs."""
        return len(self.basis(form, with_kink=True))

    def _all_held(self) -> dict[str, float]:
        held = dict(self.held)
        for first, second in self.ties:
            for name, other in ((first, second), (second, first)):
                if name in held:
                    held.setdefault(other, held[name])
        return held


NONE = Constraints()
