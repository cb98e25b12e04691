"""The factor from measured curves where the form of a law is wrong, and the cells that narrow it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import until as benchmark  # benchmarks/until.py
from scipy.stats import t as t_distribution

from lmu_dist.planning.design import MARGIN, Knowledge, PlannedCell, Question
from lmu_dist.planning.estimate import cells_of_curves, estimate
from lmu_dist.planning.learn import learn
from lmu_dist.planning.next_cell import next_cells
from lmu_dist.planning.until import MIN_FREEDOM, Target, judge

DESIGN = replace(benchmark.DESIGNS["wrong form, 0.3 %"], n_params=[1e4, 1e5, 1e6], tokens=[1e6, 1e7, 1e8])
CELLS = benchmark.planned_cells(DESIGN)
LOSSES = benchmark.simulate(DESIGN, CELLS, seed=1)
FACTOR = Question("factor", benchmark.NEW, benchmark.BASE, n_params=10**6)


def known(cells: list[PlannedCell]) -> Knowledge:
    return learn([LOSSES[cell.key] for cell in cells], benchmark.FAMILIES, benchmark.HOFFMANN, 0.005)


@pytest.fixture(scope="module")
def of_all() -> Knowledge:
    return known(CELLS)


def test_a_factor_of_a_wrong_form_comes_from_the_curves(of_all: Knowledge):
    """Three seeds, and curves that are straight between the budgets: by hand from the means of ln L."""
    assert of_all.unfit == set(benchmark.FAMILIES)
    assert of_all.interval(FACTOR)[1] is None
    found = estimate(of_all, FACTOR)
    means, squares = {}, []
    for family in benchmark.FAMILIES:
        for n in DESIGN.n_params:
            for d in DESIGN.tokens:
                logs = [
                    math.log(r.loss)
                    for r in of_all.results
                    if (r.family, r.n_params) == (family, n) and r.tokens // 256 == d // 256
                ]
                assert len(logs) == 3
                squares.append(np.var(logs) * 3)
                if n == 1e6:
                    means.setdefault(family, []).append(np.mean(logs))
    tokens = np.log([d // 256 * 256 for d in DESIGN.tokens])
    base, new = means[benchmark.BASE], means[benchmark.NEW]
    top, bottom = min(base[0], new[0]), max(base[-1], new[-1])
    log_tokens = {f: lambda y, m=m: np.interp(y, m[::-1], tokens[::-1]) for f, m in means.items()}
    y = np.linspace(bottom, top, 100_001)
    logs = log_tokens[benchmark.BASE](y) - log_tokens[benchmark.NEW](y)
    assert found.value == pytest.approx(math.exp(np.mean((logs[1:] + logs[:-1]) / 2)), rel=1e-6)
    freedom = 2 * 6  # two more seeds of each family and size: budgets of a seed may share a trunk
    assert found.freedom == freedom
    slopes = [(f(bottom) - f(top)) / (top - bottom) for f in log_tokens.values()]
    # All errors of a trunk in common would give this; here they are independent, so that they partly cancel.
    reach = t_distribution.ppf(0.95, freedom) * math.sqrt(sum(squares) / (2 * len(squares)) / 3) * math.hypot(*slopes)
    assert found.interval is not None
    assert 0.4 * MARGIN * reach < math.log(found.interval[1] / found.interval[0]) / 2 < MARGIN * reach
    assert found.interval[0] < benchmark.FACTOR < found.interval[1]
    verdict = judge(of_all, [Target(FACTOR, found.interval[1] / found.interval[0] * 1.001)])[0]
    assert verdict.reached
    losses = f"{math.exp(top):.4g} to {math.exp(bottom):.4g}"
    said = f"from measured curves, at losses of {losses} nats, since the law of transformer is not determined: misfit"
    assert said in str(verdict)


def test_without_a_second_seed_there_is_no_interval():
    found = estimate(known([cell for cell in CELLS if cell.seed == 0]), FACTOR)
    assert found.interval is None
    assert "not determined" in found.reason


def test_few_seeds_are_too_few_to_stop():
    one_size = [cell for cell in CELLS if cell.seed == 0 or (cell.seed == 1 and cell.n_params == 10**6)]
    knowledge = replace(known(one_size), unfit=frozenset(benchmark.FAMILIES))
    verdict = judge(knowledge, [Target(FACTOR, 1e6)])[0]
    assert verdict.interval is not None
    assert not verdict.reached
    assert f"2 degrees of freedom, of {MIN_FREEDOM}" in str(verdict)


def test_a_curve_of_two_budgets_is_too_short_to_stop(of_all: Knowledge):
    kept = [r for r in of_all.results if not (r.family == benchmark.NEW and r.n_params == 10**6 and r.tokens > 2 * 10**7)]
    verdict = judge(replace(of_all, results=tuple(kept)), [Target(FACTOR, 1e6)])[0]
    assert verdict.interval is not None
    assert not verdict.reached
    assert "a curve has 2 of 3 budgets that stopping needs" in str(verdict)


def test_next_are_seeds_of_the_curves_cheapest_first(of_all: Knowledge):
    """One budget of a curve has all seeds, the others one: these are missing seeds, of both families."""
    at_size = [cell for cell in CELLS if cell.n_params == 10**6]
    missing = [cell for cell in at_size if cell.seed and cell.tokens > 2 * 10**6]
    knowledge = replace(of_all, results=tuple(LOSSES[c.key] for c in CELLS if c not in missing))
    chosen = cells_of_curves(knowledge, FACTOR, missing)
    assert set(chosen) == set(missing)
    assert [cell.tokens // 10**6 for cell in chosen] == 4 * [9] + 4 * [100]
    of_one_seed = replace(knowledge, results=(*knowledge.results, *(LOSSES[c.key] for c in missing if c.seed == 1)))
    seeds = [cell.seed for cell in cells_of_curves(of_one_seed, FACTOR, [c for c in missing if c.seed == 2])]
    assert seeds == 4 * [2]
    choices = next_cells(knowledge, [FACTOR], CELLS, missing, is_enough=lambda choices: len(choices) == 2)
    assert [choice.cell for choice in choices] == chosen[:2]
    assert "the form of a law is wrong" in choices[0].reason


def test_where_the_form_fits_the_laws_decide(of_all: Knowledge):
    assert cells_of_curves(replace(of_all, unfit=frozenset()), FACTOR, CELLS) == []
    assert cells_of_curves(of_all, Question("alpha", benchmark.BASE), CELLS) == []


def test_a_curve_whose_seeds_are_used_up_gets_no_more(of_all: Knowledge):
    """Seeds of the cheapest budget have failed: the curve's interval depends on it, and seeds of others narrow nothing."""
    of_curve = [c for c in CELLS if c.n_params == 10**6 and c.family == benchmark.NEW and c.seed]
    knowledge = replace(of_all, results=tuple(LOSSES[c.key] for c in CELLS if c not in of_curve))
    without_cheapest = [c for c in of_curve if c.tokens > 2 * 10**6]
    assert len(cells_of_curves(knowledge, FACTOR, of_curve)) == 6
    failed = replace(knowledge, results=(*knowledge.results, *(LOSSES[c.key] for c in without_cheapest if c.seed == 1)))
    assert cells_of_curves(failed, FACTOR, [c for c in without_cheapest if c.seed == 2]) == []


def test_cells_that_fit_are_chosen_where_no_seed_of_a_curve_does(of_all: Knowledge):
    missing = [c for c in CELLS if c.seed == 2]
    knowledge = replace(of_all, results=tuple(LOSSES[c.key] for c in CELLS if c.seed < 2))
    dearest = min(c.steps * c.step_flops for c in missing if c.n_params == 10**6)
    chosen = next_cells(knowledge, [FACTOR], CELLS, missing, limit=0.5 * dearest)
    assert chosen
    assert {choice.cell.n_params for choice in chosen} <= {10**4, 10**5}


def test_other_questions_get_cells_beside_the_curves(of_all: Knowledge):
    missing = [c for c in CELLS if c.seed == 2]
    knowledge = replace(of_all, results=tuple(LOSSES[c.key] for c in CELLS if c.seed < 2))
    chosen = next_cells(knowledge, [FACTOR, Question("alpha", benchmark.BASE)], CELLS, missing)
    assert {choice.cell.n_params for choice in chosen[:6]} == {10**6}
    assert len(chosen) > 6
