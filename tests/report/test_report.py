"""The report: right numbers, all files, kept in MLflow, stale when it should be; and a page that works in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from simulate import TRUTH, WORTH, record, write

from lmu_dist.cli import main
from lmu_dist.report.write import Written, stale_reports, write_report
from lmu_dist.scaling.answer import answer
from lmu_dist.scaling.compare import AtSize, Comparison
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.results import analyse
from lmu_dist.tracking.store import Store, default_uri


def silent(*_: object) -> None:
    pass


def test_it_finds_the_truth(written: Written):
    answer, results = written.answer.answer, written.results
    truth = WORTH["lmu"] / WORTH["transformer"]
    assert (answer.verdict[:13], answer.source, answer.n_params) == ("Less than ten", "laws", 1_000_000)
    assert answer.factor is not None
    assert answer.factor.value == pytest.approx(truth, rel=0.1)
    assert "No change with size is seen" in answer.growth
    assert results["determined"] == dict.fromkeys(WORTH, True)
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
    slopes = {found["family"]: found for found in results["in_size"]}
    assert slopes["lmu"]["interval"][0] < slopes["lmu"]["law"]["exponent"] < slopes["lmu"]["interval"][1]
    assert slopes["lmu"]["bends"]  # towards the floor of the law it is drawn from
    for size in next(c for c in results["comparisons"] if c["new"] == "lmu")["sizes"]:
        assert size["curves"]["interval"][0] < truth < size["curves"]["interval"][1]


def test_all_files_are_there_and_in_mlflow(store: Store, written: Written):
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
    assert {"residuals_n", "residuals_d"} <= figures
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


def test_numbers_are_reproduced_by_the_commands_on_the_page(
    written: Written, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    page = (written.folder / "report.html").read_text()
    command = re.search(r"<code>lmu-dist (fit runs.csv [^<]*family=lmu [^<]*)</code>", page)
    assert command is not None
    monkeypatch.chdir(written.folder)
    arguments = command.group(1).replace("&#39;", "").split()
    assert main([*arguments, "--json", "--resamples", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = next(fit for fit in json.loads(Path("fits.json").read_text())["fits"] if fit["family"] == "lmu")
    assert found["objective"] == pytest.approx(told["objective"], rel=1e-9)
    assert found["parameters"] == pytest.approx(told["parameters"], rel=1e-6)


def test_a_report_is_stale_once_there_are_other_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    store = Store(default_uri(tmp_path))
    write(store.client, "e", [record(family, 10_000, 10**6, 0, 4.0) for family in ("lmu", "transformer")])
    first = write_report(store, "e", tmp_path / "a", False, silent)
    again = write_report(store, "e", tmp_path / "b", False, silent)
    assert (again.run_id, again.stale, stale_reports(store, "e")) == (first.run_id, (), [])  # the same inputs, the same run
    write(store.client, "e", [record("lmu", 10_000, 10**6, 1, 4.0)])
    assert stale_reports(store, "e") == [first.run_id]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["status", "e", "--once"]) == 0
    assert f"report {first.run_id} is stale" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "a" / "tokens_77.png").write_text("of an earlier study")
    second = write_report(store, "e", tmp_path / "a", False, silent)
    assert not (tmp_path / "a" / "tokens_77.png").exists()
    assert second.stale == (first.run_id,)
    assert store.client.get_run(first.run_id).data.tags["lmu.stale"] == "true"
    assert stale_reports(store, "e") == [first.run_id]


def test_a_study_too_small_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    store = Store(default_uri(tmp_path))
    write(store.client, "e", [record("lmu", 10_000, 10**6, 0, 4.0)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["report", "e", "-o", str(tmp_path / "r")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not determined. The study cannot say: there is no finished run of transformer that may be compared" in said
    assert "lmu-dist fit" in (tmp_path / "r" / "report.html").read_text()
    assert main(["report", "nothing", "-o", str(tmp_path / "r2")]) == 2
    assert not (tmp_path / "r2").exists()


def test_what_cannot_be_written_or_kept(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    store = Store(default_uri(tmp_path))
    write(store.client, "e", [record("lmu", 10_000, 10**6, 0, 4.0)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    (tmp_path / "file").touch()
    assert main(["report", "e", "-o", str(tmp_path / "file")]) == 2
    assert "choose another folder with -o" in " ".join(capsys.readouterr().err.split())

    def refuses(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuses)
    assert main(["report", "e", "-o", str(tmp_path / "r")]) == 1
    assert "the report is whole in" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "r" / "report.html").exists()
    assert [store.client.get_run(run_id).info.status for run_id, _, _ in store.reports("e")] == ["FAILED"]


def test_an_experiment_whose_runs_are_gone_has_stale_reports(tmp_path: Path):
    store = Store(default_uri(tmp_path))
    ids = write(store.client, "e", [record("lmu", 10_000, 10**6, 0, 4.0)])
    made = write_report(store, "e", tmp_path / "r", False, silent)
    store.client.delete_run(ids[0])
    assert stale_reports(store, "e") == [made.run_id]


def comparison(*sizes: tuple[int, Factor]) -> Comparison:
    unknown = Factor(None, None, None, None, None, "no law")
    return Comparison(
        "transformer", "lmu", tuple(AtSize(n, factor, unknown) for n, factor in sizes), None, None, "", (0, 0), "few"
    )


def known(value: float, low: float, high: float) -> Factor:
    return Factor(value, (low, high), (5.0, 4.0), (value, value), None, "")


def test_the_answer_is_that_of_the_largest_size_and_tells_of_others(written: Written):
    above = Factor(None, None, None, None, (">", 100.0), "the base never came so far")
    said = answer(written.study, comparison((10_000, known(2.2, 2, 2.5)), (100_000, above)), None)
    assert said.verdict == "Not determined"
    assert "more than 100 times" in said.sentence
    assert "At N = 10,000: less than ten, 2.2 times (2 to 2.5)." in said.others
    said = answer(written.study, comparison((10_000, known(2.2, 2, 2.5)), (100_000, known(14, 12, 16))), None)
    assert said.verdict == "More than ten: 14 times (12 to 16)"
    assert "less than ten" in said.others
    assert answer(written.study, comparison((10_000, known(9, 7, 11))), None).verdict.startswith("Ten is possible")
    assert "fewer is as possible" in answer(written.study, comparison((10_000, known(1.1, 0.9, 1.3))), None).sentence


def test_one_loss_in_common_is_no_interval(tmp_path: Path):
    store = Store(default_uri(tmp_path))
    losses = {("lmu", 10**6): 4.0, ("lmu", 10**7): 3.0, ("transformer", 10**6): 5.0, ("transformer", 10**7): 4.0}
    write(store.client, "e", [record(family, 10_000, tokens, 0, loss) for (family, tokens), loss in losses.items()])
    written = write_report(store, "e", tmp_path / "r", False, silent)
    assert written.answer.answer.verdict == "Not determined"
    assert written.answer.answer.sentence.startswith("At N = 10,000 the transformer needs 10 times")  # one loss of both
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
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(written: Written, browser, scheme: str, width: int):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
    page.goto((written.folder / "report.html").as_uri())
    assert page.locator(".verdict").bounding_box()["y"] < 500
    assert page.evaluate("document.documentElement.scrollWidth") == width  # wide tables scroll in themselves
    figures = [path.stem for path in written.folder.glob("*.svg")]
    for name in figures:
        assert page.locator(f"#{name} svg").bounding_box()["height"] > 100
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (lightness[0] < lightness[1]) == (scheme == "light")
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
    assert said == []
    context.close()
