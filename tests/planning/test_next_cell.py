"""The design of the next cell: variances are those of simulated fits, updates are exact, ranks and prices are right."""

from dataclasses import replace

import numpy as np
import pytest

from lmu_dist.planning.design import (
    MARGIN,
    Knowledge,
    PlannedCell,
    Question,
    huber_loss_of_precision,
    quantile,
)
from lmu_dist.planning.learn import assume, learn
from lmu_dist.planning.next_cell import next_cells
from lmu_dist.planning.prices import Costs, total_cost, trunk_cost
from lmu_dist.scaling.fit import refit_simulated
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.table import rows_from_columns

LAW = Chinchilla(E=1.6, A=14.0, B=55.0, alpha=0.30, beta=0.29)
LAWS = {"transformer": LAW, "lmu": replace(LAW, B=LAW.B * 4**-LAW.beta)}
SIZES, BUDGETS = (3000, 10_000, 30_000, 100_000, 300_000), (300_000, 1_000_000, 3_000_000, 10_000_000)
FACTOR = Question("factor", "lmu", "transformer", n_params=SIZES[-1])


def cells_of(families: tuple[str, ...] = ("transformer", "lmu"), seeds: int = 1) -> list[PlannedCell]:
    """The cells of a grid; a step has 1,000 tokens, and 20 % of the steps are the decay."""
    return [
        PlannedCell(f"{f}-{n}-{d}-{s}", f"{f} {n} {d} {s}", f, n, d, s, f"{f}-{n}-{s}", d // 1000, d // 1250, 6.0 * n * 1000)
        for f in families
        for n in SIZES
        for s in range(seeds)
        for d in BUDGETS
    ]


def results_of(cells: list[PlannedCell], noise: float = 0.0, seed: int = 0) -> list[RunLoss]:
    rng = np.random.default_rng(seed)
    losses = [float(LAWS[c.family].loss(c.n_params, c.tokens) * np.exp(noise * rng.normal())) for c in cells]
    return [RunLoss(c.family, c.n_params, c.tokens, loss, c.group) for c, loss in zip(cells, losses, strict=True)]


def deviation_of_log(knowledge: Knowledge, question: Question) -> float:
    """The standard deviation of the logarithm that the interval stands for."""
    interval = knowledge.interval(question)[1]
    assert interval is not None
    return float(np.log(interval[1] / interval[0])) / 2 / quantile(knowledge.freedom) / MARGIN


def test_deviation_is_that_of_simulated_fits():
    noise, cells = 0.004, cells_of()
    known = assume(results_of(cells), LAWS, noise)
    simulations = [results_of(cells, noise, seed) for seed in range(80)]
    fitted = dict[str, list[Chinchilla]]()
    for family, law in LAWS.items():
        tables = np.array([[(r.n_params, r.tokens, r.loss) for r in one if r.family == family] for one in simulations])
        rows = rows_from_columns(*tables[0].T)
        fitted[family] = refit_simulated(law, rows, tables[..., 2])  # pyright: ignore
    loss = known.compared_loss(FACTOR)
    base, new = ([law.tokens_for(loss, FACTOR.n_params) for law in fitted[f]] for f in FACTOR.families)  # pyright: ignore
    estimates = np.stack([np.log(np.divide(base, new)), np.log([law.beta for law in fitted["lmu"]])], axis=-1)
    simulated = np.std(estimates, axis=0)
    expected = [deviation_of_log(known, question) for question in (FACTOR, Question("beta", "lmu"))]
    assert simulated == pytest.approx(expected, rel=0.25)  # of 80 simulations: 8 %


def test_value_is_that_of_the_law_and_without_noise_it_is_the_truth():
    knowledge = learn(results_of(cells_of()), ("transformer", "lmu"), HOFFMANN, 0.005)
    assert knowledge.value(FACTOR)[0] == pytest.approx(4, rel=1e-3)
    assert knowledge.value(Question("alpha", "lmu"))[0] == pytest.approx(LAW.alpha, rel=1e-3)
    loss = Question("loss", "lmu", n_params=1e6, tokens=1e8)
    assert knowledge.value(loss)[0] == pytest.approx(float(LAWS["lmu"].loss(1e6, 1e8)), rel=1e-4)


def test_huber_fit_is_as_precise_as_least_squares_for_little_noise_and_as_absolute_errors_for_much():
    assert huber_loss_of_precision(1e-5) == pytest.approx(1, abs=1e-6)
    assert huber_loss_of_precision(1.0) == pytest.approx(np.sqrt(np.pi / 2), rel=1e-3)


@pytest.mark.parametrize("question", [FACTOR, Question("alpha", "lmu"), Question("loss", "lmu", n_params=1e6, tokens=1e8)])
def test_expected_ratio_is_that_after_the_run_and_the_first_choice_is_the_best(question: Question):
    cells = cells_of()
    done = [c for c in cells if c.tokens < BUDGETS[-1]]
    missing = [c for c in cells if c.tokens == BUDGETS[-1] and c.n_params < SIZES[-1]]  # a factor keeps its compared loss
    now = assume(results_of(done), LAWS, 0.004, shared=0.3)

    def ratio_after(more: list[PlannedCell]) -> float:
        information = {family: known.copy() for family, known in now.information.items()}
        for cell in more:
            information[cell.family].add(now.rows(cell.family, [cell.n_params], [cell.tokens])[0], cell.group)
        after = replace(now, information=information, freedom=now.freedom + len(more))
        interval = after.interval(question)[1]
        assert interval is not None
        return interval[1] / interval[0]

    choices = next_cells(now, [question], cells, missing, is_enough=lambda chosen: len(chosen) == 2)
    before = ratio_after([])
    assert choices[0].ratio_before == pytest.approx(before)
    assert choices[0].ratio_after == pytest.approx(ratio_after([choices[0].cell]))
    assert choices[1].ratio_after == pytest.approx(ratio_after([c.cell for c in choices]))
    costs = Costs(done, "flops")
    gains = {c.key: np.log(np.log(before) / np.log(ratio_after([c]))) / costs.of(c) for c in missing}
    assert max(gains, key=lambda key: gains[key]) == choices[0].cell.key
    assert choices[0].ratio_after is not None
    assert choices[0].gain == pytest.approx(1 - np.log(choices[0].ratio_after) / np.log(before))


def test_cells_of_a_trunk_share_its_steps():
    short, middle, long = (c for c in cells_of(("lmu",))[:3])
    step = short.step_flops
    assert trunk_cost([short, long], [], "flops") == pytest.approx(step * (300 + 3000 - 240))
    assert trunk_cost([long], [short], "flops") == pytest.approx(step * (3000 - 240))
    assert trunk_cost([short], [long], "flops") == pytest.approx(step * 300)  # a longer cell leaves no branch point for it
    assert trunk_cost([long], [short, middle], "flops") == pytest.approx(step * (3000 - 800))
    assert total_cost([short, long], "flops") == pytest.approx(step * (300 + 3000 - 240))


def test_start_has_the_cheap_corners_and_enough_runs_for_a_law():
    cells = cells_of(seeds=2)
    choices = next_cells(learn([], ("transformer", "lmu"), HOFFMANN, 0.005), [FACTOR], cells, cells)
    for family in LAWS:
        chosen = [c.cell for c in choices if c.cell.family == family]
        points = [(c.n_params, c.tokens) for c in chosen]
        assert len(chosen) >= 10
        assert {(3000, BUDGETS[0]), (3000, BUDGETS[-1]), (SIZES[-1], BUDGETS[0])} <= set(points)
        assert (SIZES[-1], BUDGETS[-1]) not in points
        assert len({n for n, _ in points}) >= 3
        assert len({d for _, d in points}) >= 3
        assert len([n for n, _ in points if n == SIZES[-1]]) >= 2  # so that both families reach one loss at the largest size
    assert all(choice.reason.startswith(("start:", "both families")) for choice in choices)
    assert sum(choice.cost for choice in choices) < 0.3 * total_cost(cells, "flops")


def test_budget_is_never_exceeded():
    cells = cells_of(seeds=2)
    done = [c for c in cells if c.seed == 0]
    missing = [c for c in cells if c.seed == 1]
    limit = 0.01 * total_cost(cells, "flops")
    choices = next_cells(assume(results_of(done), LAWS, 0.004), [FACTOR], cells, missing, limit=limit)
    assert 0 < sum(choice.cost for choice in choices) <= limit
    assert len(choices) < len(missing)


def test_families_without_a_common_loss_have_no_factor():
    cells = [c for c in cells_of() if c.family == "lmu" or c.tokens < 1_000_000]
    more = [replace(c, key=f"{c.key}+", n_params=c.n_params * 2) for c in cells if c.family == "transformer"]
    knowledge = assume(results_of([*cells, *more]), LAWS, 0.004)
    _, interval, reason = knowledge.interval(FACTOR)
    assert interval is None
    assert "not determined" in reason or "no loss in common" in reason
