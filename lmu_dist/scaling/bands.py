"""Mean loss in one band of positions against a later one: losses by position in, differences with 90 % intervals out.

Such a difference shows whether a model goes on using more context. Its noise has three parts, which are estimated separately:

- Text. All runs of an experiment are evaluated on the same rows, so most of the scatter from position to position is common to
  all families and seeds, and more seeds do not reduce it. Losses in a row are correlated over long distances (a whole document
  is hard), and one curve of means cannot show this: it is one draw. But rows are drawn far apart, so the standard error of a
  run's loss over rows contains all of it: SE^2 = S / (n R) for n positions and R rows, with S the sum of autocovariances in a
  row. The variance of sum_t w_t L_t with sum w = 0 is then |w|^2 S / R = |w|^2 n SE^2 if the correlation is short beside the
  bands. Otherwise this is too large, because what is constant in a row cancels.
- Between two families the common text cancels, and no standard error over rows is recorded for the rest. Its long-run variance
  is the mean square of B low-frequency cosine coefficients, and the interval is Student's t with B degrees of freedom, B = 0.4
  n^(2/3) (Lazarus, Lewis, Stock and Watson 2018, "HAR inference: recommendations for practice", Journal of Business & Economic
  Statistics 36). Trend and contrast are projected out first. Correlation over more than about n/10 positions is not seen. Only
  losses of single rows could show it; position_losses.csv has means.
- Seeds. If the differences of seeds vary more than the noise of their curves explains, models of other seeds use context
  differently. This variance is pooled over families and sizes. With one seed for each it is unknown, and taken as zero.

Called by band_table, and by docs/study/study_numbers.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import numpy as np

from lmu_dist.scaling.intervals import CONFIDENCE, Interval
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.quantiles import t_quantile

EARLY, LATE = (0.39, 0.585), (0.78, 1.0)  # of the context; at n = 256 positions 100 to 150 and 200 to 256
MIN_COSINES = 3  # fewer leave no interval
STARTS_PER_DOUBLING = 2  # of the search for where a curve is flat
MIN_OF_WAVE = 0.1  # of a cosine's norm; one of which less is left adds no direction


@dataclass(frozen=True)
class Band:
    """Positions `first` to `last` of a row, 1-based and inclusive."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"


def default_bands(n: int) -> tuple[Band, Band] | None:
    """Returns a band in the middle and one at the end of a context of n tokens; None if n is too small for two."""
    early, late = (Band(max(1, round(low * n)), round(high * n)) for low, high in (EARLY, LATE))
    return (early, late) if 1 <= early.first <= early.last < late.first <= late.last else None


@dataclass(frozen=True)
class BandDifference:
    """Mean loss in `early` minus that in `late`, in nats per token: positive if the loss falls.

    `error` is the standard error, and `interval` has 90 %; both are None if the noise cannot be estimated.
    """

    early: Band
    late: Band
    value: float
    error: float | None
    interval: Interval | None

    @property
    def side(self) -> int:
        """1 or -1 if the interval excludes zero, as the sign of the difference; 0 otherwise."""
        return 0 if self.interval is None else int(self.interval[0] > 0) - int(self.interval[1] < 0)


@dataclass(frozen=True)
class Curves:
    """Losses by position of the seeds of a family at one size and budget, (seeds, n), in nats per token.

    `errors` (seeds,) are the standard errors of their mean losses over validation rows. One that is nan or 0 is not known: a
    single row, which has no spread, is recorded as 0.
    """

    losses: Floats
    errors: Floats

    @property
    def mean(self) -> Floats:
        """The loss by position, averaged over seeds, (n,)."""
        return np.asarray(self.losses.mean(0))


@dataclass(frozen=True)
class SeedSpread:
    """Variance, between seeds of a family, of the true difference between two bands (nats^2), and its degrees of freedom."""

    variance: float
    freedom: int


def contrast(n: int, early: Band, late: Band) -> Floats:
    """Returns weights (n,) whose sum with losses by position is the mean over `early` minus that over `late`.

    Raises ValueError if the bands are not two of positions 1 to n, one after the other.
    """
    if not 1 <= early.first <= early.last < late.first <= late.last <= n:
        raise ValueError(f"{early} and {late} are no bands of positions 1 to {n}, one after the other")
    weights = np.zeros(n)
    weights[early.first - 1 : early.last] = 1 / len(early)
    weights[late.first - 1 : late.last] = -1 / len(late)
    return weights


def seed_spread(groups: Sequence[Curves], early: Band, late: Band) -> SeedSpread:
    """Returns how much the difference between two bands varies with the seed beyond the noise of curves, over all groups.

    All groups have curves of one length.
    """
    several = [group.losses - group.mean for group in groups if len(group.losses) > 1]
    freedom = sum(len(deviations) - 1 for deviations in several)
    if not freedom:
        return SeedSpread(0.0, 0)
    deviations = np.concatenate(several)
    weights = contrast(deviations.shape[1], early, late)
    basis = _cosines(deviations.shape[1], early, late)
    # Deviations from the mean of S seeds have (S - 1) / S of the variance, so sums are divided by the degrees of freedom.
    found = float(np.square(deviations @ weights).sum() / freedom)
    own = float(np.square(deviations @ basis).sum(0).mean() / freedom * (weights @ weights)) if basis.shape[1] else 0.0
    return SeedSpread(max(0.0, found - own), freedom)


def band_difference(curves: Curves, early: Band, late: Band, seeds: SeedSpread) -> BandDifference:
    """Returns the difference of one family, for texts and seeds like these. The noise of the text is an upper estimate.

    The number of validation rows, which is not known here, is taken as large: the noise of the text has the quantiles of the
    normal distribution, so that with few rows the interval is too narrow. Without an error over rows there is no interval.
    Raises ValueError for bands that are not in the curves.
    """
    n = curves.losses.shape[1]
    weights = contrast(n, early, late)
    errors = np.where(curves.errors > 0, curves.errors, np.nan)
    text = float(weights @ weights * n * np.square(errors).mean())
    parts = [(text, np.inf), (seeds.variance / len(curves.losses), float(seeds.freedom))]
    return _difference(early, late, float(weights @ curves.mean), parts)


def paired_difference(new: Curves, base: Curves, early: Band, late: Band, seeds: SeedSpread) -> BandDifference:
    """Returns the difference of one family minus that of another on the same rows: positive if the loss of `new` falls more.

    Raises ValueError for bands that are not in the curves, and for curves of two lengths.
    """
    n = new.losses.shape[1]
    if base.losses.shape[1] != n:
        raise ValueError(f"curves of {n} and {base.losses.shape[1]} positions cannot be compared")
    weights, between = contrast(n, early, late), new.mean - base.mean
    basis = _cosines(n, early, late)
    if basis.shape[1] < MIN_COSINES:
        return BandDifference(early, late, float(weights @ between), None, None)
    text = float(np.square(between @ basis).mean() * (weights @ weights))
    of_seeds = seeds.variance * (1 / len(new.losses) + 1 / len(base.losses))
    parts = [(text, float(basis.shape[1])), (of_seeds, float(seeds.freedom))]
    return _difference(early, late, float(weights @ between), parts)


@dataclass(frozen=True)
class Flat:
    """The position from which no fall of the loss is seen beyond the noise; None if it falls to the end, or is not known.

    `hidden` is the largest fall, in nats, that the noise leaves possible: the end of the interval of the difference between
    `position` to twice that, and all later positions.
    """

    position: int | None
    hidden: float | None


def flat_from(curves: Curves, spread: Callable[[Band, Band], SeedSpread]) -> Flat:
    """Finds the first position from which on no start has a fall whose interval excludes zero.

    There are two starts for each doubling. The positions from a start up to twice that are compared with all later ones. The
    noise of a few positions is overestimated, so a fall over the first few may be missed. Each start has one chance in
    twenty to show a fall where there is none, so the position tends to be late.
    """
    n = curves.losses.shape[1]
    starts = np.unique(
        np.round(2 ** np.arange(0, np.log2(max(1, n // 4)) + 1e-9, 1 / STARTS_PER_DOUBLING)).astype(int)
    ).tolist()
    found = list[tuple[int, BandDifference]]()
    for first in starts:
        early, late = Band(first, 2 * first - 1), Band(2 * first, n)
        if early.last < n:
            found.append((first, band_difference(curves, early, late, spread(early, late))))
    level = list(takewhile(lambda start: start[1].interval is not None and start[1].side <= 0, reversed(found)))
    if not level:
        return Flat(None, None)
    position, difference = level[-1]
    return Flat(position, max(0.0, difference.interval[1]) if difference.interval else None)


def _difference(early: Band, late: Band, value: float, parts: Sequence[tuple[float, float]]) -> BandDifference:
    """Adds variances with their degrees of freedom (Satterthwaite 1946)."""
    variance = sum(part for part, _ in parts)
    if not np.isfinite(variance):
        return BandDifference(early, late, value, None, None)
    of_square = sum(part**2 / freedom for part, freedom in parts if part)
    freedom = variance**2 / of_square if of_square else np.inf
    error = float(np.sqrt(variance))
    reach = t_quantile((1 + CONFIDENCE) / 2, freedom) * error
    return BandDifference(early, late, value, error, (value - reach, value + reach))


@lru_cache(maxsize=32)  # as many as a long sequence has starts; more would hold several MB each
def _cosines(n: int, early: Band, late: Band) -> Floats:
    """Returns orthonormal columns (n, B): cosines of low frequency between the bands' ends, without a trend and the contrast.

    White noise of variance v has coefficients of variance v; a trend a + b ln t and the difference itself have none. The array
    is shared between calls, and so read-only.
    """
    start, stop = early.first - 1, late.last
    position, length = np.arange(stop - start), stop - start
    wanted = min(round(0.4 * length ** (2 / 3)), length - 3)
    if wanted < 1:
        return np.zeros((n, 0))
    known = [np.ones(length), np.log(position + early.first), contrast(n, early, late)[start:stop]]
    waves = [np.cos(np.pi * k * (position + 0.5) / length) for k in range(1, wanted + 4)]
    left = np.stack(waves, axis=1)
    removed = np.linalg.qr(np.stack(known, axis=1))[0]
    left -= removed @ (removed.T @ left)
    # Frequencies in rising order. A wave that the trend and those before it explain adds no direction, and is left out; what
    # those after it add depends on that, so the rest is decomposed again. This is rare.
    columns, sizes = np.linalg.qr(left)
    while len(weak := np.flatnonzero(np.abs(np.diag(sizes))[:wanted] <= MIN_OF_WAVE * np.sqrt(length / 2))):
        left = np.delete(left, weak[0], axis=1)
        columns, sizes = np.linalg.qr(left)
    basis = np.zeros((n, min(wanted, left.shape[1])))
    basis[start:stop] = columns[:, :wanted]
    basis.setflags(write=False)
    return basis
