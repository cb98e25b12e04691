"""Sizing: every N from 1e3 to 1e9 is met within 2 %, at the paper's widths."""

import numpy as np
import pytest

from lmu_dist.models.accounting import parameters
from lmu_dist.models.families.lmu import LMUOptions
from lmu_dist.models.registry import built_in
from lmu_dist.models.sizing import shape_for

TARGETS = sorted({int(n) for n in [*np.geomspace(1e3, 1e9, 400), *range(1000, 3000, 13), 55_000, 56_000, 10**6, 10**9]})


@pytest.mark.parametrize("family", built_in())
@pytest.mark.parametrize("sequence_tokens", [64, 1024])
def test_every_size_is_within_two_percent(family, sequence_tokens):
    for n in TARGETS:
        shape = shape_for(family, n, vocab_tokens=50257, sequence_tokens=sequence_tokens)
        assert abs(parameters(shape).non_embedding / n - 1) <= 0.02, n
        assert shape.d_model % shape.widths.get("n_heads", 1) == 0
        if n >= 5e4:
            assert shape.d_model == pytest.approx((n / 24) ** 0.5, rel=0.03), n


def test_widths_of_the_papers_largest_model():
    shape = shape_for("lmu", 1_000_000, vocab_tokens=50257, sequence_tokens=1024)
    assert (shape.d_model, shape.order, shape.reduced_order) == (204, 250, 25)


def test_options_set_orders_and_a_window_longer_than_a_row():
    shape = shape_for("lmu", 60_000, vocab_tokens=97, sequence_tokens=32, options=LMUOptions(80, 5, 500))
    assert (shape.order, shape.reduced_order, shape.theta_tokens) == (80, 5, 500)


def test_impossible_size_raises_an_error():
    with pytest.raises(ValueError, match=r"no lmu of 2 blocks .* model\.n_params"):
        shape_for("lmu", 1_000, vocab_tokens=97, sequence_tokens=32, options=LMUOptions(5000, 50))
