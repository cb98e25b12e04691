"""One budget with several batches: tokens that differ by the rounding to whole batches are compared as one budget."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from matplotlib.figure import Figure
from simulate import law_of, make_record

from lmu_dist.records import RunRecord
from lmu_dist.report.panels import loss_vs_n
from lmu_dist.scaling.collect import Study, select_runs
from lmu_dist.scaling.results import _improvement, _size_law, runs_at_largest_budget
from lmu_dist.scaling.table import budget_bins
from lmu_dist.tracking.stored_runs import StoredRun, StoredRuns

FAMILIES, SIZES, BUDGETS = ("lmu", "transformer", "lstm"), (10_000, 20_000, 40_000, 80_000, 160_000), (10**6, 10**7)


def study_of(records: Sequence[RunRecord]) -> Study:
    runs = [StoredRun(f"{i}", f"run{i}", "complete", r, {"model.n_params": str(r.n_params)}) for i, r in enumerate(records)]
    return select_runs(StoredRuns("e", tuple(runs)))


def grid(batch_of: Callable[[str, int], int]) -> Study:
    """A study without noise whose budgets are rounded up to whole batches."""
    records = list[RunRecord]()
    for family in FAMILIES:
        for n in SIZES:
            for budget in BUDGETS:
                batch = batch_of(family, n)
                tokens = -(-budget // batch) * batch
                loss = float(law_of(family).loss(n, tokens))
                records.append(make_record(family, n, tokens, 0, loss, batch_tokens=batch))
    return study_of(records)


def by_size(family: str, n: int) -> int:
    """`ladder.batch_tokens` with an exponent of 2/3."""
    return round(2048 * (n / 10_000) ** (2 / 3) / 256) * 256


def by_family(family: str, n: int) -> int:
    return 3072 if family == "lstm" else 2048


def test_budgets_agree_if_rounding_or_a_small_ratio_explains_the_difference():
    def bins(*runs: tuple[int, int]) -> list[float]:
        tokens, batch = np.array(runs, np.float64).T
        return budget_bins(tokens, batch).tolist()

    assert bins((1_001_472, 2048), (1_001_472, 3072), (1_003_520, 4096)) == [1_001_472] * 3
    assert bins((106_496, 8192), (100_352, 2048), (131_072, 65_536)) == [100_352] * 3  # 30 % more, less than a batch
    assert bins((131_072, 2048), (100_352, 2048)) == [131_072, 100_352]
    assert bins((2048, 2048), (4096, 2048), (6144, 2048)) == [2048, 4096, 6144]  # whole batches of one size are budgets
    assert bins((12_000, 4000), (10_000, 1000), (12_000, 1000)) == [12_000, 10_000, 12_000]  # equal tokens are one budget


@pytest.mark.parametrize("batch_of", [lambda f, n: 2048, by_size, by_family], ids=["one batch", "by size", "by family"])
def test_results_at_equal_budgets_do_not_need_equal_batches(batch_of: Callable[[str, int], int]):
    study = grid(batch_of)
    assert len({run.budget_bin for run in study.runs}) == 2
    assert len(runs_at_largest_budget(study)) == len(FAMILIES) * len(SIZES)
    for family in FAMILIES:
        law = _size_law(study, family)
        assert (law.n_sizes, law.tokens) == (5, max(run.budget_bin for run in study.runs))
        true = np.polyfit(np.log(SIZES), np.log(law_of(family).loss(np.array(SIZES), 10**7)), 1)[0]
        assert law.law is not None
        assert law.law.exponent == pytest.approx(-true, rel=0.01)
    assert _improvement(study, 50).n_cells == len(SIZES) * len(BUDGETS)
    axes = Figure().add_subplot()
    loss_vs_n(axes, study)
    assert [len(line.get_xdata()) for line in axes.lines if line.get_marker() != "None"] == [5, 5, 5]  # pyright: ignore[reportArgumentType]


def test_settings_do_not_win_by_rounding_their_budget_up_further():
    small = [make_record("lmu", 10_000, d, 0, loss, batch_tokens=2048) for d, loss in ((301_056, 4.5), (1_001_472, 4.0))]
    large = [make_record("lmu", 10_000, d, 0, loss, batch_tokens=3072) for d, loss in ((301_056, 4.6), (1_004_544, 4.1))]
    assert [run.record.batch_tokens for run in study_of([*small, *large]).runs] == [2048, 2048]


def rate_chosen(*tried: tuple[float, dict[int, float]]) -> float:
    """The learning rate that is used, of several with the losses of their seeds."""
    records = [make_record("lmu", 10_000, 10**6, s, y, learning_rate=rate) for rate, of in tried for s, y in of.items()]
    rates = {run.record.learning_rate for run in study_of(records).runs}
    assert len(rates) == 1
    return rates.pop()


def test_more_seeds_are_no_advantage_of_settings():
    assert rate_chosen((0.01, {0: 4.05, 1: 4.06, 2: 3.99}), (0.02, {0: 4.00, 1: 4.01})) == 0.02  # better at both common seeds
    assert rate_chosen((0.01, {0: 4.2, 1: 3.9}), (0.02, {0: 4.1})) == 0.02  # at seed 0, although the other mean is lower
    assert rate_chosen((0.01, {0: 4.05, 1: 4.06}), (0.02, {2: 4.07, 3: 4.01})) == 0.02  # no common seed: means of all


def test_settings_without_the_largest_budget_are_left_out_with_that_reason():
    cells = ((0.01, 10**6, 4.0), (0.01, 10**7, 3.9), (0.02, 10**6, 3.95), (0.03, 10**7, 3.95))
    study = study_of([make_record("lmu", 10_000, d, 0, y, learning_rate=rate) for rate, d, y in cells])
    short, beaten = (out.reason for out in study.left_out)
    assert short.startswith("not the best settings: learning rate 0.02 (best 0.01); only settings with the largest budget")
    assert beaten == "not the best settings: learning rate 0.03 (best 0.01)"
