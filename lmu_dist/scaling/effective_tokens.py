"""What repeated tokens are worth: the compared laws of a family in, the effective tokens of its most repeated run out.

Called by results. Runs whose data are not repeated, or whose supported laws do not include that of repeated data, have none.
"""

from dataclasses import dataclass, replace

import numpy as np

from lmu_dist.scaling.compare_laws import LawComparison, law_intervals
from lmu_dist.scaling.forms import law_name
from lmu_dist.scaling.intervals import N_RESAMPLES, Interval
from lmu_dist.scaling.repeated import Repeated


@dataclass(frozen=True)
class EffectiveTokens:
    """As many new tokens give the same loss as `tokens` tokens of which `unique_tokens` are different.

    By the law of Muennighoff et al. 2023 (arXiv 2305.16264). `interval`, 90 %, is None if the runs give R_star none.

    If the runs do not determine R_star, the fit held it at the published `held_r_star`: `effective_tokens` is then None, and
    `with_held_r_star` has what that value gives. `tied` are the laws without an effect of repetition that describe the runs as
    well: then no loss of worth was found.
    """

    tokens: int
    unique_tokens: int
    effective_tokens: float | None
    interval: Interval | None
    held_r_star: float | None = None
    with_held_r_star: float | None = None
    tied: tuple[str, ...] = ()


def effective_tokens(comparison: LawComparison, n_resamples: int = N_RESAMPLES) -> EffectiveTokens | None:
    """Returns the effective tokens of the run that reads its data most often, by the law of repeated data.

    None if the runs repeat no data, or do not support this law. The interval has the values at the ends of that of R_star.
    """
    rows, unique = comparison.rows, comparison.rows.unique_tokens
    found = [c for c in comparison.supported if c.form is Repeated and c.fits]
    if unique is None or not found or found[0].fit is None:
        return None
    law = found[0].fit.law
    assert isinstance(law, Repeated)
    most = int(np.argmax(rows.tokens / unique))
    tokens, once = float(rows.tokens[most]), float(unique[most])
    value = float(law.effective_tokens(tokens, once))
    tied = tuple(c.name for c in comparison.supported if not c.form.NEEDS_UNIQUE)
    if "R_star" in found[0].constraints.names():
        return EffectiveTokens(round(tokens), round(once), None, None, law.R_star, value, tied)
    of_r_star = (
        law_intervals(replace(comparison, candidates=(found[0],)), n_resamples).get(law_name(Repeated), {}).get("R_star")
    )
    ends = [float(replace(law, R_star=end).effective_tokens(tokens, once)) for end in of_r_star or ()]
    return EffectiveTokens(round(tokens), round(once), value, (ends[0], ends[1]) if ends else None, tied=tied)
