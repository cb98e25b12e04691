"""Finds the cell that a forecast is about: a study and what the user asked for in, its actual N, its budget and its state out.

N is found as the planner finds it: a model of the family that is as large as was asked for, within 2 %.
"""

import ast
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmu_dist.config import ConfigError
from lmu_dist.models import registry
from lmu_dist.models.sizing import non_embedding_params, shape_for
from lmu_dist.records import COMPLETE, DIVERGED, STOPPED_EARLY
from lmu_dist.scaling.collect import Run, Study
from lmu_dist.scaling.table import is_budget
from lmu_dist.tracking.runs import retired_runs_of, runs_of
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import RUN_NAME, STATUS

if TYPE_CHECKING:  # mlflow is for tracking only
    from mlflow.entities import Run as MLflowRun

NOT_STARTED, STARTED = "not started", "started"


@dataclass(frozen=True)
class ForecastCell:
    """A family, a size and a budget. `ended` names a run of the cell that has ended; "" if there is none."""

    family: str
    requested_n_params: int
    n_params: int
    tokens: int
    trained_tokens: int
    state: str  # NOT_STARTED or STARTED
    ended: str
    notes: tuple[str, ...]


def find_cell(store: Store, study: Study, family: str, n_params: int, tokens: int) -> ForecastCell:
    """Returns the cell. Raises ConfigError if the study has no run of the family, or if no model of it has this size."""
    name = registry.find(family).name if registry.is_file_reference(family) else family
    if name not in study.families:
        raise ConfigError(
            f"--family {family}: experiment {study.experiment!r} has no finished, comparable run of it; it has runs of "
            f"{', '.join(study.families)}"
        )
    same_size = _of_size(runs_of(store, study.experiment), name, n_params)
    retired = _of_size(retired_runs_of(store, study.experiment), name, n_params)
    finished = study.runs_of(name)
    nearest = min(finished, key=lambda run: abs(run.record.n_params - n_params))
    notes = list[str]()
    if known := [run for run in finished if run.requested_n_params == n_params]:
        actual = known[0].record.n_params
    elif sized := [*same_size, *retired]:
        actual = int(sized[0].data.params["n_params"])
    else:
        actual = _planned_size(store, nearest, n_params, notes)
    batches = {run.record.batch_tokens for run in known or finished}
    batch = batches.pop() if len(batches) == 1 else 0
    trained = -(-tokens // batch) * batch if batch else tokens
    of_cell = [run for run in same_size if is_budget(tokens, *_budget(run.data.params))]
    states = {run.info.run_id: run.data.tags.get(STATUS, "") for run in of_cell}
    done = [run for run in of_cell if states[run.info.run_id] in (COMPLETE, STOPPED_EARLY)]
    done += [run for run in retired if is_budget(tokens, *_budget(run.data.params)) and _has_a_loss(run)]
    if not done and set(states.values()) == {DIVERGED}:  # and no retry is under way
        done = of_cell
    ended = done[0].data.tags.get(RUN_NAME, done[0].info.run_id) if done else ""
    if not ended and (elsewhere := runs_of_cell(finished, name, n_params, actual, tokens)):
        ended = elsewhere[0].name or elsewhere[0].run_id
    return ForecastCell(
        family=name,
        requested_n_params=n_params,
        n_params=actual,
        tokens=tokens,
        trained_tokens=trained,
        state=STARTED if of_cell else NOT_STARTED,
        ended=ended,
        notes=tuple(notes),
    )


def runs_of_cell(runs: Iterable[Run], family: str, requested_n_params: int, n_params: int, tokens: int) -> list[Run]:
    """Returns the finished runs of a cell, one for each seed that was trained."""
    return [
        run
        for run in runs
        if run.record.family == family
        and (run.requested_n_params == requested_n_params or run.record.n_params == n_params)
        and is_budget(tokens, run.record.planned_tokens, run.record.batch_tokens)
    ]


def _of_size(runs: "Iterable[MLflowRun]", family: str, n_params: int) -> "list[MLflowRun]":
    return [run for run in runs if run.data.params.get("family") == family and _requested(run) == n_params]


def _has_a_loss(run: "MLflowRun") -> bool:
    """Returns whether a run whose key --rerun has taken had ended: its loss is known, so a forecast tests nothing."""
    loss = run.data.metrics.get("final/val_loss_nats", math.nan)
    return run.data.tags.get("lmu.phase") == "decayed" and math.isfinite(loss)


def _requested(run: "MLflowRun") -> int:
    return int(run.data.params.get("model.n_params", run.data.params.get("n_params", "0")))


def _budget(params: Mapping[str, str]) -> tuple[int, int]:
    return int(params.get("planned_tokens", "0")), int(params.get("batch_tokens", "0"))


def _planned_size(store: Store, like: Run, n_params: int, notes: list[str]) -> int:
    """Returns N of a model of this size that is otherwise like a finished run. Without its family's code, N as requested."""
    with store.one_line_errors():
        params = store.client.get_run(like.run_id).data.params
    reference = params.get("model.family", like.record.family)
    try:
        family = registry.find(like.record.family if like.record.family in registry.names() else reference)
    except ConfigError:
        notes.append(
            f"the code of the family {like.record.family} is not here, so N is taken as given; models meet it within 2 %"
        )
        return n_params
    try:
        shape = shape_for(
            family,
            n_params,
            vocab_tokens=like.record.vocab_tokens,
            sequence_tokens=like.record.sequence_tokens,
            n_blocks=like.record.n_blocks,
            options=registry.options_of(family, _options(registry.option_names(family), params)),
        )
    except ValueError as e:
        raise ConfigError(f"--n {n_params:,}: {e}") from e
    return non_embedding_params(family, shape)


def _options(names: Sequence[str], params: Mapping[str, str]) -> dict[str, Any]:
    """Returns the family's own keys as a run has them; MLflow has their values as text."""
    options = dict[str, Any]()
    for name in names:
        if (text := params.get(f"model.{name}", "None")) != "None":
            options[name] = text
            with suppress(ValueError, SyntaxError):
                options[name] = ast.literal_eval(text)
    return options
