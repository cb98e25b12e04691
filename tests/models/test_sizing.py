"""Sizing: every N from 1e3 to 1e9 is met within 2 %, at the paper's widths."""

import numpy as np
import pytest

from lmu_dist.models import accounting
from lmu_dist.models.accounting import parameters
from lmu_dist.models.families.lmu import LMUOptions
from lmu_dist.models.registry import built_in
from lmu_dist.models.sizing import shape_for

TARGETS = sorted({int(n) for n in [*np.geomspace(1e3, 1e9, 200), *range(1000, 3000, 29), 55_000, 56_000, 10**6, 10**9]})
# Families whose widths depend on the length of the rows; for the others one length says all.
BY_LENGTH = ("lmu", "lmu_attention", "lmu_modern")


@pytest.mark.parametrize(("family", "sequence_tokens"), [*((f, 1024) for f in built_in()), *((f, 64) for f in BY_LENGTH)])
def test_every_size_is_within_two_percent(family, sequence_tokens):
    for n in TARGETS:
        shape = shape_for(family, n, vocab_tokens=50257, sequence_tokens=sequence_tokens)
        assert abs(parameters(shape).non_embedding / n - 1) <= 0.02, n
        if family in ("lmu_attention", "transformer", "llama"):
            assert shape.d_model % shape.n_heads == 0
        if n >= 5e4:
            assert shape.d_model == pytest.approx((n / 24) ** 0.5, rel=0.03), n


def test_widths_of_the_papers_largest_model():
    shape = shape_for("lmu", 1_000_000, vocab_tokens=50257, sequence_tokens=1024)
    assert (shape.d_model, shape.order, shape.reduced_order) == (204, 250, 25)


def test_wider_models_have_the_orders_of_the_papers_largest_one():
    for n_params, sequence_tokens in ((10**7, 1024), (10**9, 2048)):
        shape = shape_for("lmu", n_params, vocab_tokens=50257, sequence_tokens=sequence_tokens)
        assert (shape.order, shape.reduced_order) == (250, 25)
    capped = shape_for("lmu", 10**7, vocab_tokens=97, sequence_tokens=512, options=LMUOptions(max_reduced_order=8))
    assert (capped.order, capped.reduced_order) == (80, 8)
    explicit = shape_for("lmu", 10**7, vocab_tokens=97, sequence_tokens=512, options=LMUOptions(reduced_order=50))
    assert (explicit.order, explicit.reduced_order) == (500, 50)


@pytest.mark.parametrize("family", built_in())
@pytest.mark.parametrize("sequence_tokens", [256, 1024, 2048])
def test_executed_flops_are_at_most_twice_the_counted_ones(family, sequence_tokens):
    """On a GPU, at the vocabulary of GPT-2, with as many rows at once as in jobs/orders6.yaml."""
    for n_params in (10**e for e in range(3, 10)):
        shape = shape_for(family, n_params, vocab_tokens=50257, sequence_tokens=sequence_tokens)
        executed = accounting.executed_flops(shape, 2 if n_params >= 1e8 else 8, on_gpu=True)
        assert executed <= 2 * accounting.flops(shape).training, n_params


def test_options_set_orders_and_a_window_longer_than_a_row():
    shape = shape_for("lmu", 60_000, vocab_tokens=97, sequence_tokens=32, options=LMUOptions(80, 5, 500))
    assert (shape.order, shape.reduced_order, shape.theta_tokens) == (80, 5, 500)


def test_impossible_size_raises_an_error():
    with pytest.raises(ValueError, match=r"no lmu of 2 blocks .* model\.n_params"):
        shape_for("lmu", 1_000, vocab_tokens=97, sequence_tokens=32, options=LMUOptions(5000, 50))
