"""Gamma, Farseer and the laws of repeated data: gradients, units, optima, recovery; parameters that are held or tied."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from lmu_dist.config import ConfigError
from lmu_dist.scaling.compare_laws import compare_laws
from lmu_dist.scaling.constraints import Constraints
from lmu_dist.scaling.diagnostics import check_table, diagnose, fit_and_diagnose
from lmu_dist.scaling.effective_tokens import effective_tokens
from lmu_dist.scaling.fit import fit
from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, EXAMPLE_GAMMA, Gamma
from lmu_dist.scaling.intervals import small_sample_correction
from lmu_dist.scaling.laws import Chinchilla, Gadre, ScalingLaw, batch_law
from lmu_dist.scaling.misfit import find_misfit
from lmu_dist.scaling.objective import log_residuals, losses
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.repeated import Overfitted, Repeated
from lmu_dist.scaling.table import Rows, rows_from_columns
from lmu_dist.scaling.validate import fit_and_validate

N = np.array([1e8, 1e9, 5e9, 2e9])
D = np.array([1e9, 4e10, 5e11, 8e9])
U = np.array([1e9, 1e10, 1e11, 5e8])
REPEATED = Repeated(1.8, 530.0, 1950.0, 0.356, 0.362, 15.0)
OVERFITTED = Overfitted(1.8, 530.0, 1950.0, 0.356, 0.362, 15.0, 6.3e-7, 0.5, 3.5)
LAWS = [EXAMPLE_GAMMA, EXAMPLE_FARSEER, REPEATED, OVERFITTED]


def grid(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> Rows:
    """Eight sizes and nine budgets; every size reads data of two sizes up to 32 times."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(2e7, 6e9, 8), np.geomspace(4e8, 1e11, 9)))
    unique = np.minimum(d, np.where(np.arange(len(n)) % 2, 4e8, 3e9)) if law.NEEDS_UNIQUE else None
    rows = Rows(n, d, np.ones_like(n), unique)
    noisy = np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))
    return Rows(n, d, losses(law, rows) * noisy, unique)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_gradients_equal_finite_differences(law: ScalingLaw):
    values = astuple(law)  # pyright: ignore
    found = law.gradient(N, D, U)
    assert found.shape == (4, len(values))
    for i, value in enumerate(values):
        step = 1e-6 * abs(value)
        up, down = (type(law)(*(v + (sign * step if j == i else 0) for j, v in enumerate(values))) for sign in (1, -1))
        numeric = (up.loss(N, D, U) - down.loss(N, D, U)) / (2 * step)
        assert found[:, i] == pytest.approx(numeric, rel=1e-4, abs=1e-9 * abs(numeric).max())


@pytest.mark.parametrize("law", [*LAWS, HOFFMANN], ids=lambda law: type(law).__name__)
def test_gradients_by_coordinates_equal_finite_differences_also_in_a_batch(law: ScalingLaw):
    units = law.units(N, D)
    n, d, u = N / units[0], D / units[1], U / units[1]
    scaled = law.rescaled(1 / units[0], 1 / units[1])
    assert scaled.loss(n, d, u) == pytest.approx(law.loss(N, D, U))
    vector = scaled.coordinates()
    found = scaled.coordinate_gradient(n, d, u)
    for i in range(len(vector)):
        step = 1e-6 * np.eye(len(vector))[i]
        up, down = (type(law).from_coordinates(vector + sign * step).loss(n, d, u) for sign in (1, -1))
        assert found[:, i] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-7)
    vectors = np.stack([vector, vector + 0.01])
    batch = type(law).from_coordinates(vectors)
    for k in range(2):
        single = type(law).from_coordinates(vectors[k])
        assert batch.loss(n, d, u)[k] == pytest.approx(single.loss(n, d, u))
        assert batch.coordinate_gradient(n, d, u)[k] == pytest.approx(single.coordinate_gradient(n, d, u))


def test_gamma_of_one_is_chinchillas_law():
    law = Gamma(*astuple(HOFFMANN), gamma=1.0)
    assert law.loss(N, D) == pytest.approx(HOFFMANN.loss(N, D))
    assert law.optimum(1e21)[0] == pytest.approx(HOFFMANN.optimum(1e21)[0])


def test_farseers_token_exponent_depends_on_the_size():
    drops = [EXAMPLE_FARSEER.loss(n, np.array([1e10, 1e11, 1e12])) for n in (1e8, 1e10)]
    exponents = [float(np.log10((drop[0] - drop[1]) / (drop[1] - drop[2]))) for drop in drops]
    assert exponents == pytest.approx([np.exp(-0.124 * n**0.123 + 0.424) for n in (1e8, 1e10)])
    assert EXAMPLE_FARSEER.loss(1e9, 1e10) == pytest.approx(
        np.exp(-0.021 * 1e9**0.169 - 0.091) + np.exp(88.01 * 1e9**-0.1 - 5.287) * 1e10 ** -np.exp(-0.124 * 1e9**0.123 + 0.424)
    )


@pytest.mark.parametrize("law", [EXAMPLE_FARSEER, EXAMPLE_GAMMA], ids=["search", "closed form"])
def test_the_optimum_has_the_lowest_loss_at_its_compute(law: ScalingLaw):
    flops = np.array([1e20, 1e21])
    n, d = law.optimum(flops)
    assert 6 * n * d == pytest.approx(flops)
    for i in range(2):
        sizes = n[i] * np.geomspace(0.5, 2, 2001)
        at = law.loss(sizes, flops[i] / (6 * sizes))
        assert sizes[at.argmin()] == pytest.approx(n[i], rel=1e-3)


def test_effective_tokens_are_those_of_muennighoff():
    # Four readings of U are worth U (1 + R (1 - exp(-3/R))) tokens; one reading, or fewer, is worth itself.
    r = REPEATED.R_star
    once = Chinchilla(*astuple(REPEATED)[:5])
    assert REPEATED.loss(1e9, 4e9, 1e9) == pytest.approx(once.loss(1e9, 1e9 * (1 + r * (1 - np.exp(-3 / r)))))
    assert REPEATED.loss(1e9, 4e9) == pytest.approx(once.loss(1e9, 4e9))
    assert REPEATED.loss(1e9, 4e9, 8e9) == pytest.approx(once.loss(1e9, 4e9))
    assert REPEATED.loss(1e9, 1e15, 1e9) == pytest.approx(once.loss(1e9, 1e9 * (1 + r)))
    assert OVERFITTED.loss(1e9, 10e9, 1e9) - REPEATED.loss(1e9, 10e9, 1e9) == pytest.approx(6.3e-7 * 1e9**0.5 * 6.5)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_tables_without_noise_recover_their_law(law: ScalingLaw):
    rows = grid(law)
    found = fit(type(law), rows)
    assert diagnose(found, rows).passed
    predicted = found.law.loss(4 * N, D, U)
    assert predicted == pytest.approx(law.loss(4 * N, D, U), rel=1e-4 if type(law).KINK else 1e-5)
    if not law.FLEXIBLE:
        assert astuple(found.law) == pytest.approx(astuple(law), rel=1e-2 if type(law).KINK else 1e-4)  # pyright: ignore


def test_what_a_table_does_not_determine_is_held_at_its_published_value():
    rows = grid(OVERFITTED, 0.002)
    kept = rows.where(rows.unique_tokens == 4e8)
    fitted, diagnostics, constraints, notes = fit_and_diagnose(Repeated, kept)
    free, _, no_constraints, no_notes = fit_and_diagnose(Overfitted, rows)
    assert not no_notes
    assert not no_constraints.names()
    assert free.law.loss(3e9, 1e11, 1e10) == pytest.approx(OVERFITTED.loss(3e9, 1e11, 1e10), rel=0.02)
    assert bool(notes) == ("R_star" in constraints.names())
    assert fitted.law.R_star == pytest.approx(15.387756) or not notes  # pyright: ignore
    assert diagnostics.passed or not notes


def test_held_and_tied_parameters():
    rows = grid(HOFFMANN, 0.003)
    result = fit_and_validate(Chinchilla, rows, n_resamples=100, constraints=Constraints({"E": 1.69}))
    assert isinstance(result.law, Chinchilla)
    assert pytest.approx(1.69) == result.law.E
    assert "E" not in result.intervals
    assert not {"E"} & set(result.influence)
    equal = grid(Gadre(1.7, 150, 300, -0.26), 0.003)
    tied = fit_and_validate(Chinchilla, equal, n_resamples=100, constraints=Constraints(ties=(("alpha", "beta"),)))
    assert isinstance(tied.law, Chinchilla)
    assert tied.law.alpha == tied.law.beta
    assert (tied.objective or 0) >= fit(Chinchilla, equal).objective
    assert tied.profiles["alpha"] == pytest.approx(tied.profiles["beta"])
    without = grid(Gadre(1.7, 150, 300, -0.26))  # of which Chinchilla's law with equal exponents is the same
    assert fit(Chinchilla, without, Constraints(ties=(("alpha", "beta"),))).law.alpha == pytest.approx(0.26)  # pyright: ignore
    with pytest.raises(ConfigError, match="--fix A: chinchilla has these parameters without units: alpha, beta, E"):
        Constraints({"A": 3.0}).check(Chinchilla)
    with pytest.raises(ConfigError, match="--tie gamma"):
        Constraints(ties=(("gamma", "alpha"),)).check(Chinchilla)


def test_only_free_parameters_take_degrees_of_freedom():
    rows, held, tied = grid(HOFFMANN, 0.0002), Constraints({"E": 1.69}), Constraints(ties=(("alpha", "beta"),))
    assert (Constraints().n_free(Chinchilla), held.n_free(Chinchilla), tied.n_free(Chinchilla)) == (5, 4, 4)
    assert Constraints({"R_star": 15.0}).n_free(Overfitted) == 8  # epochs is fitted, too, although on a grid
    few = rows.where(np.arange(len(rows)) < 10)
    quadratic = np.mean(np.abs(log_residuals(fit(Chinchilla, few, held).law, few)) <= 1e-3)  # all, with so little noise
    assert quadratic == 1
    # Student's t with 10 - 4 degrees of freedom, from a table, over the normal's quantile; and 10/6 for the shrinkage.
    assert small_sample_correction(fit(Chinchilla, few, held), few, list("abcdefghij")) == pytest.approx(
        10 / 6 * 1.94318 / 1.64485, rel=1e-4
    )
    nine = rows.where(np.isin(np.arange(len(rows)), [0, 9, 18, 27, 37, 47, 57, 67, 8]))
    assert check_table(Chinchilla, nine)
    assert not check_table(Chinchilla, nine, held)


@pytest.mark.parametrize(("floor", "is_wrong"), [(1.69, False), (1.5, True), (1.85, True)])
def test_a_parameter_that_is_held_at_a_wrong_value_is_a_misfit(floor: float, is_wrong: bool):
    rows = grid(HOFFMANN, 0.003)
    assert bool(find_misfit(fit(Chinchilla, rows, Constraints({"E": floor})), rows).reasons) == is_wrong


def test_batch_laws_take_numbers_and_arrays():
    assert batch_law(Chinchilla, astuple(HOFFMANN)) == HOFFMANN
    many = batch_law(Chinchilla, [np.array([v, v]) for v in astuple(HOFFMANN)])
    assert many.loss(N, D).shape == (2, 4)


def test_effective_tokens_are_those_of_the_true_law_and_only_of_repeated_data():
    rows = grid(REPEATED, noise=0.002)
    found = effective_tokens(compare_laws(rows, [Repeated], holdouts=False), 60)
    assert found is not None
    assert found.interval is not None
    assert (found.tokens, found.unique_tokens) == (10**11, 4 * 10**8)  # 250 readings
    assert found.effective_tokens == pytest.approx(4e8 * (1 + 15), rel=0.05)  # as many as repetition can ever be worth
    assert found.interval[0] < 4e8 * (1 + 15) < found.interval[1]
    assert found.tied == ()
    assert effective_tokens(compare_laws(replace(rows, unique_tokens=None), [Chinchilla], holdouts=False), 60) is None


def test_a_published_r_star_is_not_what_the_tokens_of_a_study_are_worth():
    """Two readings of the data show little: the fit holds R*, and the law without an effect of repetition fits as well."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 3e5, 4), 1e6 * 2.0 ** np.arange(5)))
    noise = np.exp(np.random.default_rng(4).normal(0, 0.005, len(n)))
    rows = rows_from_columns(n, d, Repeated(2.0, 60.0, 400.0, 0.35, 0.37, 50.0).loss(n, d, 8e6) * noise, np.full(len(n), 8e6))
    found = effective_tokens(compare_laws(rows, [Chinchilla, Repeated], holdouts=False), 60)
    assert found is not None
    assert (found.effective_tokens, found.interval, found.held_r_star, found.tied) == (None, None, 15.387756, ("chinchilla",))
    assert found.with_held_r_star == pytest.approx(15_745_594, rel=1e-6)
