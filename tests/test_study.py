"""The published study: its numbers are those that its tables of records give, and its text has no other numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import make as study_tool
import pytest
from further_numbers import own_key_numbers
from simulate import TOKEN_WORTH, make_record, position_curve, simulate_study

from lmu_dist.report.tables import write_forecast_csv, write_position_csv
from lmu_dist.scaling.collect import select_runs
from lmu_dist.scaling.run_csv import write_run_csv
from lmu_dist.tracking.forecasts import StoredForecast
from lmu_dist.tracking.stored_runs import StoredRun, StoredRuns

STUDY = Path(__file__).parents[1] / "docs" / "study"
published = pytest.mark.skipif(not (STUDY / "README.md").exists(), reason="the study is not published yet")
HOUR_MS = 3_600_000
TRUTH = TOKEN_WORTH["lmu"] / TOKEN_WORTH["transformer"]
TEXT = """The LMU: {{ pairs.lmu_over_transformer.sizes["1000000"] | factor }}, the paper says {{ fixed("10") }}.
{{ n_runs }} runs, {{ cost.runs.tokens | si }} tokens, {{ cost.runs.hours | g }} hours. `code 1`, [link](a1.md), ten words.
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study with a known truth, as `make study` makes it."""
    folder = tmp_path_factory.mktemp("study")
    records = simulate_study(("lmu", "transformer"), (10_000, 100_000, 1_000_000), (10**6, 10**7, 10**8), (0, 1), noise=0.004)
    branches = [replace(r, fork_step=r.steps // 4, training_seconds=3600.0) for r in records]
    runs = tuple(
        StoredRun(
            f"r{i}", f"run-{i}", "complete", r, {"data.source": "simulation"}, "", i * HOUR_MS + 1, (i + 2) * HOUR_MS + 1, "1"
        )
        for i, r in enumerate(branches)
    )
    stored = StoredRuns("simulated", runs, (), "transformer")
    write_run_csv(folder / "runs.csv", select_runs(stored), stored)
    write_run_csv(folder / "tuning.csv", select_runs(stored), replace(stored, runs=runs))
    law = records[-1]
    forecast = StoredForecast(
        family="transformer",
        requested_n_params=law.n_params,
        n_params=law.n_params,
        tokens=law.tokens,
        trained_tokens=law.tokens,
        loss_nats=law.val_loss_nats * 1.01,
        low_nats=law.val_loss_nats * 0.98,
        high_nats=law.val_loss_nats * 1.04,
        level=0.9,
        law="chinchilla",
        laws={"chinchilla": 1.0},
        n_runs=20,
        runs_digest="d",
        cell_state="not started",
        warnings=("few runs",),
        made="1970-01-01T00:30:00.000+00:00",
        lmu_dist="0",
        git_commit="",
        run_id="f",
    )
    write_forecast_csv(folder / "forecasts.csv", [forecast])
    at_one_length = [replace(run, experiment="context") for run in runs if run.record and run.record.planned_tokens == 10**6]
    (folder / "contexts" / "256").mkdir(parents=True)
    given = replace(stored, runs=tuple(at_one_length))
    write_run_csv(folder / "contexts" / "256" / "runs.csv", select_runs(given), given)
    curves = {run.run_id: position_curve(run.record, 64) for run in at_one_length if run.record}
    write_position_csv(folder / "contexts" / "256" / "position_losses.csv", curves)
    (folder / "README.md.in").write_text(TEXT)
    study_tool.make(folder, n_resamples=100)
    return folder


def test_the_numbers_of_a_simulated_study_are_right(made: Path):
    numbers = json.loads((made / "numbers.json").read_text())
    pair = numbers["pairs"]["lmu_over_transformer"]
    assert list(pair["sizes"]) == ["10000", "100000", "1000000"]
    for size in pair["sizes"].values():
        assert size["curves"]["low"] < size["curves"]["value"] < size["curves"]["high"]
        assert size["curves"]["value"] == pytest.approx(TRUTH, rel=0.2)
        assert size["value"] == pytest.approx(TRUTH, rel=0.2)
    assert pair["growth"]["low"] < 1 < pair["growth"]["high"]
    assert pair["verdict"].startswith("Less than 10 times")
    assert numbers["noise"]["deviation"] == pytest.approx(0.004, rel=0.6)
    assert [cell["families"][0]["family"] for cell in numbers["order"]] == ["lmu"] * 9
    for cell in numbers["order"]:
        best, second = cell["families"]
        assert best["low"] < best["loss"] < best["high"]
        assert best["loss"] * (1 + second["behind"]) == pytest.approx(second["loss"])
        assert second["tied"] == (second["behind_low"] <= 0)
    assert (numbers["n_runs"], numbers["n_left_out"], numbers["budgets"]) == (36, 0, [10**6, 10**7, 10**8])
    assert numbers["forecasts"]["n_scored"] == numbers["forecasts"]["n_inside"] == 1
    assert numbers["forecasts"]["median_absolute_error"] == pytest.approx(0.01, rel=0.5)
    cost = numbers["cost"]["runs"]
    assert cost["hours"] == pytest.approx(37)  # each run starts an hour after the one before and takes two
    assert cost["worker_hours_in_steps"] == pytest.approx(36 * 0.75, rel=1e-3)  # the rest of each trunk is another run's
    assert cost["tokens"] == pytest.approx(0.75 * 12 * (10**6 + 10**7 + 10**8), rel=1e-3)
    assert numbers["tuned"]["trials"] == {
        family: {str(n): 6 for n in (10_000, 100_000, 1_000_000)} for family in ("lmu", "transformer")
    }


def test_the_figures_are_of_these_runs(made: Path):
    digest = json.loads((made / "numbers.json").read_text())["digest"]
    names = {path.stem for path in (made / "figures").iterdir()}
    assert names == {"main", "loss_vs_tokens", "factors", "order", "forecasts", "contexts"}
    for name in names:
        assert f"runs {digest}" in (made / "figures" / f"{name}.svg").read_text()
        assert (made / "figures" / f"{name}.png").stat().st_size > 10_000


def test_a_wrong_digit_in_the_text_is_an_error(made: Path, tmp_path: Path):
    copy = shutil.copytree(made, tmp_path / "copy")
    study_tool.check_text(copy)
    text = (copy / "README.md").read_text()
    places = [i for i, character in enumerate(text) if character.isdigit()]
    assert len(places) > 15
    for i in places:
        (copy / "README.md").write_text(f"{text[:i]}{(int(text[i]) + 1) % 10}{text[i + 1 :]}")
        with pytest.raises(ValueError, match=r"README.md, line \d: .* should be .*; run `make study`"):
            study_tool.check_text(copy)
    (copy / "README.md").write_text(text + "more")
    with pytest.raises(ValueError, match=r"line 4: 'more' should be '\(end\)'"):
        study_tool.check_text(copy)


def test_a_wrong_number_beside_the_text_is_an_error(made: Path, tmp_path: Path):
    numbers = json.loads((made / "numbers.json").read_text())
    study_tool.check_numbers(made, numbers)
    (tmp_path / "numbers.json").write_text(json.dumps(numbers))
    value = numbers["pairs"]["lmu_over_transformer"]["sizes"]["10000"]["value"]
    numbers["pairs"]["lmu_over_transformer"]["sizes"]["10000"]["value"] = value * 1.001
    with pytest.raises(ValueError, match=r"pairs.lmu_over_transformer.sizes.10000.value: .* but the runs give"):
        study_tool.check_numbers(tmp_path, numbers)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("good\nthe factor is 4.1", "line 2: the factor is 4.1"),
        ("{{ n_runs }} of\n\n40 runs", "line 3: 40 runs"),
        ("{{ n_rums }} runs", "'n_rums' is undefined"),
        ("a\n{{ laws.gru.alpha }}", "line 2: .* has no attribute 'gru'"),
        ("{{ n_runs ", "line 1"),
    ],
)
def test_a_template_with_other_numbers_is_an_error(template: str, message: str):
    with pytest.raises(ValueError, match=message):
        study_tool.render(template, {"n_runs": 36, "laws": {}})


def test_how_numbers_are_written():
    bound = {"value": None, "low": None, "high": None, "side": ">", "bound": 3.14159}
    template = (
        "{{ a | g }} {{ b | g(2) }} {{ c | g }} {{ d | percent(2) }} {{ e | n }} {{ e | si }} {{ f | factor }} {{ g | factor }}"
    )
    known = {"value": 1.1666, "low": 0.9211, "high": 1.489, "side": "", "bound": None}
    values = {"a": 1.1666, "b": 0.012345, "c": 12345.6, "d": 0.01234, "e": 2_500_000, "f": known, "g": bound}
    text = study_tool.render(template, values).splitlines()[1]
    assert text == "1.17 0.012 12,346 1.23 % 2,500,000 2.5M 1.17 (0.921 to 1.49) more than 3.14"


def test_the_numbers_of_a_context_are_those_of_its_tables(made: Path):
    [(length, found)] = json.loads((made / "numbers.json").read_text())["contexts"].items()
    assert (length, found["sequence_tokens"], found["n_runs"]) == ("256", 256, 12)
    assert {cell["tokens"] for cell in found["order"]} == {10**6}
    assert [cell["families"][0]["family"] for cell in found["order"]] == ["lmu"] * 3
    assert set(found["bands"]) == {"lmu", "transformer"}
    fall = found["bands"]["lmu"]["1000000"]
    assert fall["early"][1] < fall["late"][0]
    assert fall["value"] == pytest.approx(0, abs=0.01)  # its curve is flat from position 64


def test_the_gain_of_own_keys_is_over_the_rule_at_its_best_rate():
    def trial(family: str, loss: float, status: str = "complete", **params: object) -> StoredRun:
        record = make_record(family, 30_000, 500_000, 0, loss)
        return StoredRun(f"{family}{loss}", "t", status, record, {f"model.{k}": str(v) for k, v in params.items()})

    trials = [
        trial("lmu", 4.9, order=20, theta_tokens=64),
        trial("lmu", 4.75, order=40, theta_tokens=64),
        trial("lmu", 4.8, order=100, theta_tokens=64),
        trial("lmu", 4.0, "diverged", order=40, theta_tokens=128),
        trial("llama", 4.7, n_blocks=2),
        trial("llama", 4.66, n_blocks=3),
    ]
    rules = {"lmu": {"0.04": 5.0, "0.08": 5.2}, "llama": {"0.02": 4.6}}
    found = own_key_numbers(StoredRuns("keys", tuple(trials)), rules)
    assert found["lmu"]["n_trials"] == 3
    assert found["lmu"]["varied"] == {"model.order": ["20", "40", "100"]}
    assert found["lmu"]["best"] == {"loss": 4.75, "settings": {"model.order": "40"}}
    assert (found["lmu"]["rule_loss"], found["lmu"]["worst_loss"]) == (5.0, 4.9)
    assert found["lmu"]["gain"] == pytest.approx(0.05)
    assert found["llama"]["gain"] == pytest.approx(1 - 4.66 / 4.6)  # no trial is better


@published
def test_the_published_text_has_the_published_numbers():
    study_tool.check_text(STUDY)


@published
def test_the_published_numbers_are_those_of_the_runs():
    study_tool.check_numbers(STUDY, study_tool.compute(STUDY))


@published
def test_the_published_figures_are_of_the_runs_and_are_shown():
    numbers, text = json.loads((STUDY / "numbers.json").read_text()), (STUDY / "README.md").read_text()
    drawn = sorted((STUDY / "figures").glob("*.svg"))
    assert drawn
    for path in drawn:
        assert f"runs {numbers['digest']}" in path.read_text(), f"{path.name} is of other runs: make study"
        assert path.with_suffix(".png").exists()
    assert "figures/main.png" in text
