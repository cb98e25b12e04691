"""What `lmu-dist next` says of an experiment: before any run, with some, with a wrong question, and when nothing is left."""

import json
from dataclasses import replace

import pytest
from simulate import law_of, simulate_study, write_runs_to_mlflow

from lmu_dist import cli
from lmu_dist.config import ConfigError
from lmu_dist.planning.design import PlannedCell
from lmu_dist.planning.plan_rows import to_row
from lmu_dist.planning.proposal import propose, questions_of
from lmu_dist.records import RunRecord
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import write_plan

SIZES, BUDGETS = (10_000, 100_000, 1_000_000), (10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6)
STUDY = simulate_study(("lmu", "transformer"), SIZES, BUDGETS, seeds=(0, 1))
DONE = [r for r in STUDY if r.seed == 0]


def planned(r: RunRecord) -> PlannedCell:
    return PlannedCell(
        key=r.key,
        name=f"{r.family}-{r.n_params}-{r.tokens}-s{r.seed}",
        family=r.family,
        n_params=r.n_params,
        tokens=r.tokens,
        seed=r.seed,
        trunk=f"{r.family}-{r.n_params}-{r.seed}",
        steps=r.steps,
        decay_start=int(0.8 * r.steps),
        step_flops=r.training_flops_per_token * r.batch_tokens,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Experiments in which `some`, `none` and `all` of the planned cells have runs, and one with an `old` plan."""
    made = Store(default_uri(tmp_path_factory.mktemp("store")))
    for experiment, plan, runs in (
        ("some", STUDY, DONE),
        ("none", STUDY, []),
        ("all", DONE[:1] + DONE[-1:], DONE[:1] + DONE[-1:]),
    ):
        others = [replace(r, key=f"{experiment}-{r.key}") for r in plan]  # no other experiment has trained them
        write_plan(made, experiment, "ladder", [to_row(planned(r)) for r in others])
        write_runs_to_mlflow(made.client, experiment, [replace(r, key=f"{experiment}-{r.key}") for r in runs])
    write_plan(made, "old", "ladder", [{"name": "a", "key": "a", "planned_tokens": 1, "n_workers": 1}])
    return made


def test_interval_is_narrow_and_every_row_takes_those_above_it_as_done(store: Store):
    proposal = propose(store, "some", "factor", None, 4, "flops")
    assert proposal.n_missing == len(STUDY) - len(DONE)
    assert len(proposal.choices) == 4
    assert f"data-efficiency factor of lmu over transformer at N = {SIZES[-1]:,}" in proposal.known[0]
    for above, below in zip(proposal.choices, proposal.choices[1:], strict=False):
        assert below.ratio_before == above.ratio_after
        assert below.ratio_after is not None
        assert below.ratio_before is not None
        assert 1 < below.ratio_after < below.ratio_before
    done = {f"some-{r.key}" for r in DONE}
    assert not done & {choice.cell.key for choice in proposal.choices}


def test_exponents_and_losses_can_be_asked_for_one_family(store: Store):
    [known] = propose(store, "some", "beta", "lmu", 1, "flops").known
    value = float(known.removeprefix("beta of lmu: ").split()[0])
    assert value == pytest.approx(law_of("lmu").beta, rel=0.1)
    [known] = propose(store, "some", "loss=2M, 3e8", "lmu", 1, "flops").known
    value = float(known.removeprefix("loss of lmu at N = 2e+06, D = 3e+08: ").split()[0])
    assert value == pytest.approx(float(law_of("lmu").loss(2e6, 3e8)), rel=0.02)


def test_without_runs_the_space_is_filled_and_it_says_so(store: Store):
    proposal = propose(store, "none", "factor", None, 3, "flops")
    assert "not determined" in proposal.known[0]
    assert all(choice.reason.startswith("start: only 0 distinct runs") for choice in proposal.choices)
    assert all(choice.ratio_before is None for choice in proposal.choices)
    assert "none" in proposal.lines()[3]


def test_nothing_is_left_when_all_cells_have_ended(store: Store):
    proposal = propose(store, "all", "alpha", None, 3, "flops")
    assert proposal.lines()[-1] == "all planned cells have ended or are running"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing", "factor", None, "flops"), "no experiment 'missing'"),
        (("old", "factor", None, "flops"), "its plan was written by an earlier version; start its ladder once"),
        (("some", "speed", None, "flops"), "--ask speed: must be factor, alpha, beta or loss=N,D"),
        (("some", "loss=1e6", None, "flops"), "give N and D as positive numbers"),
        (("some", "loss=a,b", None, "flops"), "give N and D as positive numbers"),
        (("some", "alpha", "lstm", "flops"), "--family lstm: the plan has lmu, transformer"),
        (("some", "factor", "transformer", "flops"), "a factor needs a family besides transformer"),
        (("some", "factor", None, "hours"), "step times are unknown"),
    ],
)
def test_mistakes_are_one_line(store: Store, arguments: tuple[str, str, str | None, str], message: str):
    experiment, ask, family, per = arguments
    with pytest.raises(ConfigError, match=message):
        propose(store, experiment, ask, family, 1, per)


def test_factors_are_over_the_baseline_that_is_asked_for_or_planned():
    cells = [planned(r) for r in STUDY]
    [asked] = questions_of(cells, "factor", None, "lmu")
    assert (asked.family, asked.base) == ("transformer", "lmu")
    [of_plan] = questions_of(cells, "factor", None, None, "lmu")
    assert of_plan == asked
    with pytest.raises(ConfigError, match="--baseline gpt: the plan has lmu, transformer"):
        questions_of(cells, "factor", None, "gpt")
    with pytest.raises(ConfigError, match="--baseline lmu: only --ask factor compares families, and --ask is alpha; leave it"):
        questions_of(cells, "alpha", None, "lmu")


def test_command_prints_a_table_or_json(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert cli.main(["next", "some", "--count", "2", "--ask", "alpha"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["alpha of lmu", "alpha of transformer"]
    assert lines[-1] == "2 of 24 cells that are planned and not started"
    assert cli.main(["next", "some", "--count", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["cells"]) == 2
    assert answer["cells"][0]["gain_per_cost"] == pytest.approx(answer["cells"][0]["gain"] / answer["cells"][0]["cost"])
