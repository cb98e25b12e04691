"""Scaling laws: published values, gradients against finite differences, optimal allocations against a search."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from lmu_dist.scaling import published
from lmu_dist.scaling.laws import Chinchilla, Gadre, Kaplan, ScalingLaw
from lmu_dist.scaling.published import HOFFMANN, KAPLAN_BATCH, KAPLAN_N, KAPLAN_ND, KAPLAN_NS, paper_loss

ND = np.array([[1e6, 1e8], [1e8, 1e8], [1e8, 2.2e10], [1.5e9, 2.2e10]]).T


def test_kaplans_published_values():
    assert KAPLAN_ND.loss(*ND) == pytest.approx([4.03131, 3.51427, 2.77417, 2.31255], abs=1e-5)
    assert KAPLAN_NS.loss([1e6, 1e8, 1.5e9], [1e4, 1e4, 1e5]) == pytest.approx([4.30113, 3.10823, 2.32836], abs=1e-5)
    assert KAPLAN_BATCH.tokens([2.5, 3, 4]) == pytest.approx([2674649, 1122570, 285277], abs=1)
    assert KAPLAN_BATCH.s_min(250_000, 524_288, 3) == pytest.approx(79589.1467, abs=1e-3)
    assert replace(KAPLAN_NS, alpha_N=0.076).compute_exponent(KAPLAN_BATCH) == pytest.approx(0.0520, abs=5e-5)
    assert KAPLAN_BATCH.c_min(1e18, 1122570, 3) == pytest.approx(5e17, rel=1e-5)  # at B_crit half of the compute is wasted


def test_power_laws_invert():
    assert KAPLAN_N.loss(8.8e13) == pytest.approx(1)
    assert KAPLAN_N.x_for(KAPLAN_N.loss([1e6, 1e9])) == pytest.approx([1e6, 1e9])
    assert published.KAPLAN_D.loss(5.4e13 / np.e) == pytest.approx(np.exp(0.095))


@pytest.mark.parametrize(
    ("family", "loss"), [("lstm", 4.27), ("lmu", 3.95), ("lmu_attention", 3.91)], ids=["lstm", "lmu", "lmu_attention"]
)
def test_the_papers_losses_at_a_million_parameters(family: str, loss: float):
    assert paper_loss(family, 1e6) == pytest.approx(loss, abs=0.006)


def test_the_papers_transformer_loss_is_a_fixed_point():
    loss = float(paper_loss("transformer", 1e6))
    steps = published.PAPER_CRITICAL.s_min(published.PAPER_STEPS, published.PAPER_BATCH_TOKENS, loss)
    assert KAPLAN_NS.loss(1e6, steps) == pytest.approx(loss, rel=1e-9)
    assert 4.1 < loss < 4.25
    with pytest.raises(KeyError):
        paper_loss("mamba", 1e6)


FORMS = [HOFFMANN, KAPLAN_ND, Gadre(1.8, 166.0, 366.0, -0.27)]


@pytest.mark.parametrize("law", FORMS, ids=lambda law: type(law).__name__)
def test_gradients(law: ScalingLaw):
    values = astuple(law)  # pyright: ignore
    found = law.gradient(*ND)
    assert found.shape == (4, len(values))
    for i, value in enumerate(values):
        step = 1e-6 * abs(value)
        up, down = (type(law)(*(v + (sign * step if j == i else 0) for j, v in enumerate(values))) for sign in (1, -1))
        assert found[:, i] == pytest.approx((up.loss(*ND) - down.loss(*ND)) / (2 * step), rel=1e-5)


def test_gradients_of_power_laws_and_step_laws():
    for law, inputs in ((KAPLAN_N, (ND[0],)), (KAPLAN_NS, (ND[0], ND[1] / 1e4))):
        values = astuple(law)
        for i, value in enumerate(values):
            step = 1e-6 * value
            up, down = (type(law)(*(v + (sign * step if j == i else 0) for j, v in enumerate(values))) for sign in (1, -1))
            numeric = (up.loss(*inputs) - down.loss(*inputs)) / (2 * step)
            assert law.gradient(*inputs)[:, i] == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize("law", FORMS, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize(("k", "gamma"), [(6.0, 1.0), (200.0, 0.9)])
def test_the_optimum_has_the_lowest_loss_at_its_compute(law: ScalingLaw, k: float, gamma: float):
    flops = 1e20
    n, d = law.optimum(flops, k, gamma)
    assert k * n**gamma * d == pytest.approx(flops)
    sizes = n * np.geomspace(0.5, 2, 2001)
    losses = law.loss(sizes, flops / (k * sizes**gamma))
    assert sizes[losses.argmin()] == pytest.approx(n, rel=1e-3)


def test_chinchillas_optimum_in_closed_form():
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    n, d = HOFFMANN.optimum(5.76e23)
    assert n == pytest.approx(g * (5.76e23 / 6) ** (0.28 / 0.62))
    assert d == pytest.approx((5.76e23 / 6) ** (0.34 / 0.62) / g)


def test_kaplans_optimum_agrees_with_a_search():
    c_min = 1e20
    n, steps = KAPLAN_NS.optimum(c_min, KAPLAN_BATCH)
    best = KAPLAN_NS.loss(n, steps)
    assert 6 * n * KAPLAN_BATCH.tokens(best) * steps == pytest.approx(c_min, rel=1e-6)
    for other in (n * 0.8, n * 1.25):  # the steps that the compute allows, at the loss that they reach
        losses = np.linspace(float(best) * 0.98, float(best) * 1.02, 4001)
        predicted = KAPLAN_NS.loss(other, c_min / (6 * other * KAPLAN_BATCH.tokens(losses)))
        assert losses[np.abs(predicted - losses).argmin()] > best


def test_rescaled_laws_have_the_same_loss():
    for law in FORMS:
        scaled = law.rescaled(1e-6, 1e-9)  # N in millions, D in billions
        assert scaled.loss(ND[0] / 1e6, ND[1] / 1e9) == pytest.approx(law.loss(*ND))


def test_tokens_for_inverts_the_law_and_is_nan_below_the_floor():
    assert HOFFMANN.tokens_for(HOFFMANN.loss(1e8, 3e9), 1e8) == pytest.approx(3e9)
    assert np.isnan(HOFFMANN.tokens_for(1.7, 1e8))


def test_kaplans_law_with_infinite_data():
    assert KAPLAN_ND.loss(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    assert isinstance(Kaplan.additive(KAPLAN_ND), Chinchilla)
