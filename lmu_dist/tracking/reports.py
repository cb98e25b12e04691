"""Saves reports in MLflow: files, numbers and the digest of their inputs in, a run of the experiment out. For report/write."""

import time
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Metric, Param

from lmu_dist.tracking import pages
from lmu_dist.tracking.errors import MLflowUnavailableError, one_line
from lmu_dist.tracking.experiments import set_experiment_tags
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import describe_study
from lmu_dist.tracking.tags import ANSWER, REPORT, REPORT_ANY_CODE, REPORT_FACTOR, RUN_NAME, STALE, STUDY


def save_report(
    store: Store,
    experiment: str,
    digest: str,
    any_code: bool,
    factor: str,
    files: Sequence[Path],
    params: dict[str, str],
    metrics: dict[str, float],
    answer: str = "",
) -> tuple[str, list[str]]:
    """Saves a report as a run of its experiment. Returns its run id and the ids of older reports, which are marked stale.

    `factor` is the name of the factor that the report is about, as in "lmu_over_transformer". The studies of the experiment get
    the answer, one sentence, and the files too. A report of the same inputs and factor replaces the files of the same run.
    Raises MLflowUnavailableError, also if MLflow cannot store the files; the run is FAILED then.
    """
    known = reports_of(store, experiment)
    same = [run_id for run_id, old, any_old in known if (old, any_old) == (digest, any_code)]
    with store.one_line_errors():
        factors = {run_id: store.client.get_run(run_id).data.tags.get(REPORT_FACTOR, factor) for run_id in same}
    same = [run_id for run_id in same if factors[run_id] == factor]  # reports of earlier versions do not name theirs
    others = [run_id for run_id, old, any_old in known if old != digest and any_old == any_code]
    with store.one_line_errors():
        found = store.client.get_experiment_by_name(experiment)
        assert found is not None
        tags = {REPORT: digest, REPORT_ANY_CODE: str(any_code), REPORT_FACTOR: factor, RUN_NAME: "report"}
        run_id = same[0] if same else store.client.create_run(found.experiment_id, tags=tags).info.run_id
        now = int(time.time() * 1000)
        new_params = [] if same else [Param(k, v) for k, v in params.items()]
        store.client.log_batch(run_id, [Metric(k, v, now, 0) for k, v in metrics.items()], new_params)
        studies = [s.info.run_id for s in store.search_runs([found.experiment_id], f"tags.`{STUDY}` LIKE '%'")]
        try:
            for file in files:
                store.client.log_artifact(run_id, str(file))
                for study_id in studies:
                    store.client.log_artifact(study_id, str(file), "report")
        except (OSError, ImportError) as e:  # from the client of the artifact store
            store.client.set_terminated(run_id, "FAILED")
            raise MLflowUnavailableError(f"MLflow at {store.uri} cannot store the files of run {run_id}: {one_line(e)}") from e
        store.client.set_tag(run_id, STALE, "false")
        store.client.set_tag(run_id, REPORT_FACTOR, factor)
        store.client.set_tag(run_id, pages.NOTE, answer)
        store.client.set_terminated(run_id)
        for other in others:
            store.client.set_tag(other, STALE, "true")
        set_experiment_tags(store, found.experiment_id, answer)
        for study_id in studies:
            store.client.set_tag(study_id, ANSWER, answer)
    for study_id in studies:
        describe_study(store, experiment, study_id)
    return run_id, others


def reports_of(store: Store, experiment: str) -> list[tuple[str, str, bool]]:
    """(run id, digest of its inputs, whether these may differ in code) of the reports of an experiment, newest first."""
    with store.one_line_errors():
        found = store.client.get_experiment_by_name(experiment)
        runs = store.search_runs([found.experiment_id], f"tags.`{REPORT}` LIKE '%'") if found else []
        return [(r.info.run_id, r.data.tags[REPORT], r.data.tags.get(REPORT_ANY_CODE) == "True") for r in runs]
