"""All laws that can be fitted, by the name that `lmu-dist fit --law` takes."""

from lmu_dist.scaling.flexible_laws import Farseer, Gamma
from lmu_dist.scaling.laws import Chinchilla, Gadre, Kaplan, ScalingLaw
from lmu_dist.scaling.repeated import Overfitted, Repeated

FORMS: dict[str, type[ScalingLaw]] = {
    "chinchilla": Chinchilla,
    "kaplan": Kaplan,
    "gadre": Gadre,
    "gamma": Gamma,
    "farseer": Farseer,
    "repeated": Repeated,
    "overfitted": Overfitted,
}


def law_name(form: type[ScalingLaw]) -> str:
    """Returns the name of a law."""
    return form.__name__.lower()
