"""What people see of an experiment on MLflow's web pages: descriptions, the order of the charts, the link that opens its runs.

Runs in, texts and links out; asks MLflow for nothing. Called by experiments, studies, show and cli. MLflow 3.17 opens every
experiment with views for GenAI, which do not show training runs, unless the link says otherwise (`workflowType`). It orders
charts by the names of metrics, unless the link names a view that is saved in a tag of the experiment.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lmu_dist import records

if TYPE_CHECKING:  # importing it takes seconds, and the command line needs only the links
    from mlflow.entities import Run

NOTE = "mlflow.note.content"  # tag: the description, in Markdown
OURS = "A scaling study by lmu-dist."  # in the descriptions of experiments that this module wrote
VIEW = "lmu-dist"  # key of the saved view
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
MAX_NOTE = 7000  # characters; a tag of MLflow has at most 8000
# The sections of charts in their order, each with the metrics of its charts; MLflow appends all others.
SECTIONS: dict[str, tuple[str, ...]] = {
    "val": (records.VAL_LOSS, records.BITS_PER_BYTE, records.VAL_ERROR),
    "train": (records.TRAIN_LOSS, records.LEARNING_RATE, records.GRAD_NORM, records.TRAIN_TOKENS),
    "position": (records.POSITION_LOSS,),
    "speed": (records.TOKENS_PER_SECOND, records.MODEL_FLOPS, records.PEAK_SHARE),
    "memory": (records.WORKER_BYTES,),
}


def runs_path(experiment_id: str) -> str:
    """The link to the runs of an experiment with their charts, relative to the URL of an MLflow server."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"


def experiments_path() -> str:
    """The link to the list of experiments, relative to the URL of an MLflow server."""
    return "#/experiments?workflowType=machine_learning"


def ui_hint(experiment: str) -> str:
    """The command that opens an experiment in MLflow, for people to copy."""
    return f"lmu-dist ui {experiment}"


def experiment_tags(experiment_id: str, families: Iterable[str], answer: str = "") -> dict[str, str]:
    """The tags of an experiment: its description and its view of the runs, with a group for each family."""
    note = (
        f"[Open the runs with their charts]({runs_path(experiment_id)}). {OURS}\n\n{_answer(answer)}"  # the page shows one line
        "A parent run (`ladder`, `tune`, `train`) is a study: its description has a table of its cells, which are its child "
        "runs. The run `report` has the fitted laws and the page `report.html`."
    )
    return {NOTE: note, VIEW_TAG: _view(families)}


def describe_study(study: str, runs: "Sequence[Run]", n_missing: int, answer: str = "") -> tuple[str, dict[str, float]]:
    """The description of a study, in Markdown, and its metrics. `n_missing`: cells that it plans and that have no run."""
    rows = sorted(runs, key=lambda run: (run.data.params.get("family", ""), _params(run), _tokens(run), _name(run)))
    complete = [run for run in rows if run.data.tags.get("lmu.status") == records.COMPLETE]
    losses = {run.info.run_id: run.data.metrics.get("final/val_loss_nats", math.nan) for run in complete}
    metrics = {
        "study/cells": float(len(rows) + n_missing),
        "study/complete_cells": float(len(complete)),
        "study/tokens": sum(run.data.metrics.get("final/tokens", 0.0) for run in rows),
        "study/training_seconds": sum(run.data.metrics.get("final/training_seconds", 0.0) for run in rows),
    }
    for run in complete:
        name = f"study/best_val_loss_nats/{run.data.params.get('family', 'unknown')}"
        metrics[name] = min(metrics.get(name, math.inf), losses[run.info.run_id])
    waiting = f", {n_missing} have not started" if n_missing else ""
    lines = [
        f"{_answer(answer)}The study `{study}`: {len(rows) + n_missing} cells, {len(complete)} complete{waiting}.",
        "",
        "| family | N | tokens | seed | status | validation loss, nats | bits per byte |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for i, run in enumerate(rows):
        if sum(len(line) + 1 for line in lines) > MAX_NOTE:
            lines.append(f"\n... and {len(rows) - i} more")
            break
        params, values = run.data.params, run.data.metrics
        loss, bits = losses.get(run.info.run_id, math.nan), values.get("final/val_bits_per_byte", math.nan)
        status = run.data.tags.get("lmu.status", "")
        numbers = (
            f"{_params(run):,} | {_tokens(run):,} | {params.get('seed', '')} | {status} | {_number(loss)} | {_number(bits)}"
        )
        lines.append(f"| {params.get('family', '')} | {numbers} |")
    return "\n".join(lines), {key: value for key, value in metrics.items() if math.isfinite(value)}


def _answer(answer: str) -> str:
    return f"**{answer}**\n\n" if answer else ""


def _params(run: "Run") -> int:
    return int(run.data.params.get("n_params", "0"))


def _tokens(run: "Run") -> int:
    return int(run.data.params.get("planned_tokens", "0"))


def _name(run: "Run") -> str:
    return run.data.tags.get("mlflow.runName", "")


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _view(families: Iterable[str]) -> str:
    """The state of MLflow's page of runs, in the format in which the page itself saves a view that is shared.

    The runs are grouped by family. The page opens the tree of parent runs folded up, and draws no curves of folded runs.
    """
    sections = [_section(name) for name in SECTIONS]
    charts = [_chart(name, metric) for name, metrics in SECTIONS.items() for metric in metrics]
    view = {
        "runsHiddenMode": "FIRST_20_RUNS",  # all other runs have no line in the charts
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "family"}]},
        "groupsExpanded": {f"param.family.{family}": True for family in sorted(families)},
        "useGroupedValuesInCharts": False,  # a line for each run, not for each group
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # keep this order
    }
    return json.dumps(view)


def _section(name: str) -> Mapping[str, object]:
    state = {"display": True, "isReordered": False, "deleted": False, "isGenerated": True, "columns": 2}
    return {"uuid": name, "name": name, **state}


def _chart(section: str, metric: str) -> Mapping[str, object]:
    return {
        "uuid": metric,
        "type": "LINE",
        "runsCountToCompare": 10,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": True,
        "metricKey": metric,
        "displayName": metric.rpartition("/")[2],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
