"""The report: correct numbers, all files, upload to MLflow, stale reports, and the page in a browser."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from simulate import TOKEN_WORTH, TRUTH, make_record, write_runs_to_mlflow

from lmu_dist.cli import main
from lmu_dist.report.page import render
from lmu_dist.report.write import ReportFiles, stale_reports, write_report
from lmu_dist.scaling.answer import answer
from lmu_dist.scaling.compare import Comparison, SizeComparison
from lmu_dist.scaling.effective_tokens import EffectiveTokens
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.results import analyse
from lmu_dist.scaling.trunk_noise import TrunkNoise
from lmu_dist.tracking.reports import reports_of, save_report
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import write_plan

NO_SEEDS = TrunkNoise(())


def ignore_progress(*_: object) -> None:
    pass


def test_the_report_recovers_the_simulated_truth(written: ReportFiles):
    answer, results = written.results.answer, written.results_json
    truth = TOKEN_WORTH["lmu"] / TOKEN_WORTH["transformer"]
    assert (answer.verdict[:18], answer.source, answer.n_params) == ("Less than 10 times", "laws", 1_000_000)
    assert answer.factor is not None
    assert answer.factor.value == pytest.approx(truth, rel=0.1)
    assert "No change of the factor with model size was found" in answer.growth
    assert results["determined"] == dict.fromkeys(TOKEN_WORTH, True)
    for fit in json.loads((written.folder / "fits.json").read_text())["fits"]:
        low, high = fit["intervals"]["alpha"]
        assert 0.8 * TRUTH.alpha < low < high < 1.25 * TRUTH.alpha
        assert len(fit["conventions"]) == 4
        usual, _, with_head, _ = fit["conventions"]
        assert usual["exponent"] == pytest.approx(TRUTH.beta / (TRUTH.alpha + TRUTH.beta), abs=0.04)
        assert usual["parabola_exponent"] == pytest.approx(usual["exponent"], abs=0.1)
        assert with_head["exponent"] != usual["exponent"]
        assert abs(fit["holdout"]["mean_error"]) < 0.03
    ratio = results["improvement"]
    assert ratio["interval"][0] < ratio["value"] < ratio["interval"][1]
    assert results["seed_noise"]["deviation"] == pytest.approx(0.004, rel=0.3)
    levels = {(p["family"], p["n_params"]): p["level"] for p in results["positions"]}
    assert levels["lmu", 1_000_000]["position"] == pytest.approx(64, rel=0.5)
    assert levels["transformer", 1_000_000]["position"] is None or levels["transformer", 1_000_000]["position"] > 100
    falls = {row["family"]: row for row in results["bands"] if row["n_params"] == 1_000_000}
    assert falls["transformer"]["difference"]["value"] > falls["lmu"]["difference"]["value"] == pytest.approx(0)
    assert falls["lmu"]["reference"] == "transformer"
    assert falls["lmu"]["paired"]["value"] == pytest.approx(-falls["transformer"]["difference"]["value"])
    page = (written.folder / "report.html").read_text()
    assert all(sentence in page for sentence in results["band_sentences"])
    slopes = {found["family"]: found for found in results["in_size"]}
    assert slopes["lmu"]["interval"][0] < slopes["lmu"]["law"]["exponent"] < slopes["lmu"]["interval"][1]
    assert slopes["lmu"]["bends"]  # towards the irreducible loss of the law it is simulated from
    for size in next(c for c in results["comparisons"] if c["new"] == "lmu")["sizes"]:
        assert size["curves"]["interval"][0] < truth < size["curves"]["interval"][1]


def test_all_files_are_written_and_uploaded(store: Store, written: ReportFiles):
    names = {path.name for path in written.folder.iterdir()}
    assert {"runs.csv", "fits.json", "results.json", "report.html"} <= names
    figures = {name.removesuffix(".png") for name in names if name.endswith(".png")}
    assert {
        "loss_vs_n",
        "efficiency",
        "tokens_10000",
        "position",
        "efficiency_by_position",
        "frontier",
        "isoflop_lmu",
    } <= figures
    assert {"residuals_n", "residuals_d", "forecasts"} <= figures
    assert {f"{name}.svg" for name in figures} <= names
    kept = {file.path for file in store.client.list_artifacts(written.run_id)}
    assert kept == names
    run = store.client.get_run(written.run_id)
    assert run.data.tags["lmu.report"] == written.study.digest
    key = "efficiency_factor/lmu_over_transformer/laws/1000000"
    assert run.data.metrics[f"{key}_low"] < run.data.metrics[key] < run.data.metrics[f"{key}_high"]
    facts = json.loads((written.folder / "fits.json").read_text())
    assert facts["digest"] == written.study.digest
    assert sorted(run_id for fit in facts["fits"] for run_id in fit["run_ids"]) == sorted(r.run_id for r in written.study.runs)


def test_the_commands_on_the_page_reproduce_its_numbers(
    written: ReportFiles, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    page = (written.folder / "report.html").read_text()
    command = re.search(r"<code>lmu-dist (fit runs.csv [^<]*family=lmu [^<]*)</code>", page)
    assert command is not None
    monkeypatch.chdir(written.folder)
    arguments = command.group(1).replace("&#39;", "").split()
    assert main([*arguments, "--json", "--resamples", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    reported = next(fit for fit in json.loads(Path("fits.json").read_text())["fits"] if fit["family"] == "lmu")
    assert found["objective"] == pytest.approx(reported["objective"], rel=1e-9)
    assert found["parameters"] == pytest.approx(reported["parameters"], rel=1e-6)


@pytest.mark.usefixtures("no_figures")
def test_a_report_is_stale_after_the_runs_change(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    store = Store(default_uri(tmp_path))
    write_runs_to_mlflow(store.client, "e", [make_record(family, 10_000, 10**6, 0, 4.0) for family in ("lmu", "transformer")])
    first = write_report(store, "e", tmp_path / "a", False, ignore_progress)
    again = write_report(store, "e", tmp_path / "b", False, ignore_progress)
    assert (again.run_id, again.stale, stale_reports(store, "e")) == (first.run_id, (), [])  # equal inputs give the same run
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 1, 4.0)])
    assert stale_reports(store, "e") == [first.run_id]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["status", "e", "--once"]) == 0
    assert f"report {first.run_id} is stale" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "a" / "tokens_77.png").write_text("of an earlier study")
    second = write_report(store, "e", tmp_path / "a", False, ignore_progress)
    assert not (tmp_path / "a" / "tokens_77.png").exists()
    assert second.stale == (first.run_id,)
    assert store.client.get_run(first.run_id).data.tags["lmu.stale"] == "true"
    assert stale_reports(store, "e") == [first.run_id]


def test_a_study_without_the_base_family_gives_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    store = Store(default_uri(tmp_path))
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 0, 4.0)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["report", "e", "-o", str(tmp_path / "r")]) == 0
    messages = " ".join(capsys.readouterr().out.split())
    assert (
        "Not determined. This study cannot answer the question: it has no finished, comparable run of transformer" in messages
    )
    assert "lmu-dist fit" in (tmp_path / "r" / "report.html").read_text()
    assert main(["report", "nothing", "-o", str(tmp_path / "r2")]) == 2
    assert not (tmp_path / "r2").exists()


def test_the_pair_of_a_report_is_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    store = Store(default_uri(tmp_path))
    losses = {"transformer": (5.0, 4.0), "lmu": (4.0, 3.0), "llama": (4.5, 3.5)}
    records = [
        make_record(family, 10_000, 10**6 * 4**i, seed, loss + 0.01 * seed)
        for family, of_budgets in losses.items()
        for i, loss in enumerate(of_budgets)
        for seed in (0, 1)
    ]
    write_runs_to_mlflow(store.client, "e", records)
    write_plan(store, "e", "ladder", [], "llama")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["report", "e", "-o", str(tmp_path / "none"), "--baseline", "gpt"]) == 2
    message = "--baseline gpt: experiment 'e' has finished, comparable runs of lmu, transformer, llama"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()

    assert main(["report", "e", "-o", str(tmp_path / "planned"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["version"], planned["pair"]["base"], planned["pair"]["new"]) == (2, "llama", "lmu")
    assert {c["base"] for c in planned["comparisons"]} == {"llama"}
    page = (tmp_path / "planned" / "report.html").read_text()
    assert "as plan.baseline of its ladder says" in page
    [command] = set(re.findall(r"<code>lmu-dist (report e --baseline llama --family lmu --json)", page))
    assert "the paper&#39;s LMU beside a transformer of today" in page
    write_plan(store, "e", "ladder", [], "transformer")
    assert main([*command.split(), "-o", str(tmp_path / "again")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["answer"], again["controlled"]) == (planned["answer"], planned["controlled"])
    [(run_id, digest, _)] = reports_of(store, "e")
    assert store.client.get_run(run_id).data.tags["lmu.report_factor"] == "lmu_over_llama"
    other, stale = save_report(store, "e", digest, False, "lmu_over_transformer", [], {}, {})
    assert (other != run_id, stale, stale_reports(store, "e")) == (True, [], [])

    write_plan(store, "e", "ladder", [], "llama")  # then the pair that is usual without a plan needs options
    assert main(["report", "e", "-o", str(tmp_path / "usual"), "--baseline", "transformer"]) == 0
    assert "report e --baseline transformer --family lmu --json" in (tmp_path / "usual" / "report.html").read_text()


def test_unwritable_folder_and_failed_upload(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    store = Store(default_uri(tmp_path))
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 0, 4.0)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    (tmp_path / "file").touch()
    assert main(["report", "e", "-o", str(tmp_path / "file")]) == 2
    assert "choose another folder with -o" in " ".join(capsys.readouterr().err.split())

    def refuses(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuses)
    assert main(["report", "e", "-o", str(tmp_path / "r")]) == 1
    assert "the report was written to" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "r" / "report.html").exists()
    assert [store.client.get_run(run_id).info.status for run_id, _, _ in reports_of(store, "e")] == ["FAILED"]


@pytest.mark.usefixtures("no_figures")
def test_reports_of_deleted_runs_are_stale(tmp_path: Path):
    store = Store(default_uri(tmp_path))
    ids = write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 0, 4.0)])
    made = write_report(store, "e", tmp_path / "r", False, ignore_progress)
    store.client.delete_run(ids[0])
    assert stale_reports(store, "e") == [made.run_id]


def comparison(*sizes: tuple[int, Factor]) -> Comparison:
    unknown = Factor(None, None, None, None, None, "no law")
    return Comparison(
        "transformer", "lmu", tuple(SizeComparison(n, factor, unknown) for n, factor in sizes), None, None, "", (0, 0), "few"
    )


def factor_with_interval(value: float, low: float, high: float) -> Factor:
    return Factor(value, (low, high), (5.0, 4.0), (value, value), None, "")


def test_the_answer_is_for_the_largest_size_and_mentions_others(written: ReportFiles):
    above = Factor(None, None, None, None, (">", 100.0), "the base did not reach this loss")
    result = answer(written.study, comparison((10_000, factor_with_interval(2.2, 2, 2.5)), (100_000, above)), NO_SEEDS)
    assert result.verdict == "Not determined"
    assert "more than 100 times" in result.sentence
    assert "At N = 10,000 the verdict is different: less than 10 times, namely 2.2 times (2 to 2.5)." in result.others
    result = answer(
        written.study,
        comparison((10_000, factor_with_interval(2.2, 2, 2.5)), (100_000, factor_with_interval(14, 12, 16))),
        NO_SEEDS,
    )
    assert result.verdict == "More than 10 times: 14 times (12 to 16)"
    assert "less than 10 times" in result.others
    assert answer(written.study, comparison((10_000, factor_with_interval(9, 7, 11))), NO_SEEDS).verdict.startswith(
        "10 times is possible"
    )
    assert (
        "interval includes 1"
        in answer(written.study, comparison((10_000, factor_with_interval(1.1, 0.9, 1.3))), NO_SEEDS).sentence
    )


def test_runs_that_repeat_their_data_are_marked(written: ReportFiles):
    """In this study the corpus is smaller than the largest budget."""
    budgets = sorted({run.record.tokens for run in written.study.runs})
    unique = budgets[-1] // 4
    runs = tuple(replace(run, record=replace(run.record, unique_tokens=unique)) for run in written.study.runs)
    study = replace(written.study, runs=runs)
    repeating = [run for run in runs if run.record.tokens > unique]
    assert 0 < len(repeating) < len(runs)
    [caveat] = [text for text in answer(study, None, NO_SEEDS).caveats if "epochs" in text]
    assert caveat.startswith(f"{len(repeating)} of the {len(runs)} runs repeat their data, up to 4 epochs")
    page = render(study, written.results, written.forecasts, [], [])
    assert page.count('<b title="repeats its data">') == len(repeating)
    assert "Epochs in bold" in page
    assert "Epochs in bold" not in render(written.study, written.results, written.forecasts, [], [])


def test_what_repeated_tokens_are_worth_is_said_only_if_it_is_determined(written: ReportFiles):
    def page(effective: EffectiveTokens) -> str:
        fits = (replace(written.results.fits[0], effective=effective), *written.results.fits[1:])
        return render(written.study, replace(written.results, fits=fits), written.forecasts, [], [])

    held = page(EffectiveTokens(16_000_000, 8_000_000, None, None, 15.387756, 15_745_594.0, ("chinchilla",)))
    assert "is not determined by these runs" in held
    assert "With the published R* = 15.4 it would be 15,745,594 new ones." in held
    assert "are worth 15" not in held
    assert "no loss of worth was found" in held
    known = page(EffectiveTokens(16_000_000, 8_000_000, 12e6, (11e6, 13e6)))
    assert "most often are worth 12,000,000 new ones (90 %: 11,000,000 to 13,000,000)." in known
    assert "no loss of worth" not in known


def test_one_common_loss_gives_no_interval(tmp_path: Path):
    store = Store(default_uri(tmp_path))
    losses = {("lmu", 10**6): 4.0, ("lmu", 10**7): 3.0, ("transformer", 10**6): 5.0, ("transformer", 10**7): 4.0}
    write_runs_to_mlflow(
        store.client, "e", [make_record(family, 10_000, tokens, 0, loss) for (family, tokens), loss in losses.items()]
    )
    written = write_report(store, "e", tmp_path / "r", False, ignore_progress)
    assert written.results.answer.verdict == "Not determined"
    assert written.results.answer.sentence.startswith(
        "At N = 10,000 parameters, the transformer needs 10 times"
    )  # one common loss
    assert analyse(written.study, {}).positions == ()


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium here; install one (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
def test_the_page_in_a_browser(written: ReportFiles, browser, colour_scheme: str, width: int):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colour_scheme, offline=True)
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else messages.append(request.url))
    page.goto((written.folder / "report.html").as_uri())
    assert page.locator(".verdict").bounding_box()["y"] < 500
    assert page.evaluate("document.documentElement.scrollWidth") == width  # wide tables scroll inside their own box
    figures = [path.stem for path in written.folder.glob("*.svg")]
    for name in figures:
        assert page.locator(f"#{name} svg").bounding_box()["height"] > 100
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (lightness[0] < lightness[1]) == (colour_scheme == "light")
    column = page.locator("#runs tbody tr td:nth-child(7)")
    page.locator("#runs th:nth-child(7) button").click()
    losses = [float(text) for text in column.all_inner_texts()]
    assert losses == sorted(losses)
    page.locator("#runs th:nth-child(7) button").click()
    assert [float(text) for text in column.all_inner_texts()] == sorted(losses, reverse=True)
    page.locator("#filter").fill("lstm 1,000,000")
    shown = [row.inner_text() for row in page.locator("#runs tbody tr:visible").all()]
    assert 0 < len(shown) < len(losses)
    assert all("LSTM" in text for text in shown)
    assert messages == []
    context.close()


def test_a_report_that_fails_leaves_the_folder_as_it_was(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise MemoryError

    earlier = {"report.html": "earlier", "loss_by_tokens.png": "figure", "runs.csv": "table"}
    for name, text in earlier.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("lmu_dist.report.write.analyse", fails)
    with pytest.raises(MemoryError):
        write_report(store, "quickstart", tmp_path, False, ignore_progress)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == earlier
