"""The laws side by side: verdicts and sentences that say no more than the comparison supports; no false alarms in studies."""

from dataclasses import replace

import numpy as np
import pytest
from simulate import law_of, simulate_study

from lmu_dist.report.law_table import law_rows, law_sentence, misfit_sentence, p_text
from lmu_dist.report.write import ReportFiles
from lmu_dist.scaling.collect import Run
from lmu_dist.scaling.family_laws import compare_family_laws, missing_runs
from lmu_dist.scaling.fit import fit
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.misfit import Misfit, find_misfit
from lmu_dist.scaling.table import rows_from_columns
from lmu_dist.scaling.table_checks import check_rows


def runs_of(records: list) -> list[Run]:
    return [Run(f"id{i}", f"run{i}", r.n_params, r) for i, r in enumerate(records)]


def test_verdicts_of_a_study_that_kaplan_does_not_fit():
    comparison = compare_family_laws(runs_of(simulate_study(("lmu",), noise=0.002)))
    rows = {row.name: row for row in law_rows(comparison)}
    assert rows["kaplan"].verdict == "does not fit"
    assert not rows["kaplan"].supported
    errors = [rows[name].error_of_sizes for name in ("kaplan", "chinchilla")]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] > 3 * errors[1] > 0
    assert rows["chinchilla"].supported
    assert rows["chinchilla"].verdict.startswith(("tied with ", "supported"))
    assert "chinchilla" in law_sentence(comparison)
    assert sum(row.weight for row in rows.values()) == pytest.approx(1)


def test_a_law_that_does_not_fit_is_not_called_supported():
    grid = simulate_study(("lmu",), (8_000, 40_000), (10**5, 2 * 10**5, 4 * 10**5), (0, 1))
    comparison = compare_family_laws(runs_of(grid))
    kaplan = law_rows(comparison)[0]
    assert (kaplan.name, kaplan.supported) == ("kaplan", False)
    assert kaplan.verdict == "does not fit"
    too_few = "only 2 distinct values of N, but the law needs 3 that differ by 5 % or more"
    assert law_sentence(comparison) == f"These runs cannot tell laws apart: {too_few}."
    assert missing_runs(runs_of(grid)) == [too_few]
    assert law_rows(comparison)[1].verdict.startswith("not fitted: only 2 distinct values of N")


def test_misfit_in_words():
    misfit = Misfit(0.0026, -0.0099, (1,), (-0.0099,), (), 0.001, 0.35, 0.0033, ())
    text = misfit_sentence(misfit, ("a", "b")).replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "The law misses the losses by 0.26% at the median, and by -0.99% at most (run b). Seeds differ by 0.33%. "
        "The misses vary with N and D no more than noise does (p = 0.35)."
    )
    wrong = misfit_sentence(replace(misfit, p_value=1e-9, reasons=("misfit",)), ("a", "b"))
    assert f"({p_text(1e-9)}): this form is wrong here" in wrong
    assert "too few runs to test" in misfit_sentence(replace(misfit, p_value=None), ("a", "b"))


def test_the_page_has_the_laws_of_each_family(written: ReportFiles):
    page = (written.folder / "report.html").read_text()
    assert page.count('<table class="cards">') == len(written.results.fits) + 2  # beside them: all families, bands of positions
    assert page.count("The law misses the losses by") == len(written.results.fits)
    for fitted in written.results.fits:
        assert law_sentence(fitted.comparison) in page


def test_runs_of_a_study_are_not_taken_for_rows_of_another_kind():
    n, d = (a.ravel() for a in np.meshgrid([1e3, 2e5, 1e6], np.arange(1, 10) * 1e7))
    loss = law_of("lmu").loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.002, n.size))
    rows, names = rows_from_columns(n, d, loss), [f"row {i}" for i in range(n.size)]
    assert len(check_rows(rows, names).reasons) == 2  # 1e3 looks like another unit, and the budgets like logged steps
    known = check_rows(rows, names, names)
    assert (known.reasons, known.warnings, known.labels) == ((), (), tuple(names))


def test_small_studies_keep_their_law():
    """Of studies that have the form of the law few are called a misfit: 1 % is the significance of the test."""
    alarms = 0
    for seed in range(30):
        grid = simulate_study(("lmu",), (10_000, 31_623, 100_000, 316_228), seeds=(0, 1), noise=0.005, noise_seed=seed)
        rows = rows_from_columns([r.n_params for r in grid], [r.tokens for r in grid], [r.val_loss_nats for r in grid])
        alarms += bool(find_misfit(fit(Chinchilla, rows), rows).reasons)
    assert alarms <= 2
