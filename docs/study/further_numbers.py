"""Numbers of what the study ran beside its grid: contexts of several lengths, and each family's own keys. Called by make.py."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from study_numbers import bands_by_family, loss_order

from lmu_dist.records import COMPLETE
from lmu_dist.report.inputs import ReportInputs
from lmu_dist.scaling.as_json import to_json
from lmu_dist.scaling.results import Results
from lmu_dist.tracking.stored_runs import StoredRun, StoredRuns


def context_numbers(inputs: ReportInputs, results: Results) -> dict[str, Any]:
    """The losses of one length of context, in order, and their falls between bands of positions."""
    runs = [run.record for run in inputs.study.runs]
    return to_json(
        {
            "sequence_tokens": runs[0].sequence_tokens,
            "batch_tokens": runs[0].batch_tokens,
            "n_runs": len(runs),
            "noise": vars(results.noise.overall) if results.noise.overall else None,
            "order": loss_order(inputs.study, results.noise),
            "bands": bands_by_family(results),
        }
    )


def own_key_numbers(stored: StoredRuns, rule_losses: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The trials of each family's own keys: what was varied, the best trial, and its gain over the family's rule.

    `rule_losses`: by family and learning rate, of the rule at this size and budget; the lowest one counts. `gain` is the share
    of its loss by which the best trial is lower, negative if all trials are worse.
    """
    trials = defaultdict[str, list[StoredRun]](list)
    for run in stored.runs:
        if run.record is not None and run.status == COMPLETE:
            trials[run.record.family].append(run)
    found = dict[str, Any]()
    for family, runs in trials.items():
        best = min(runs, key=_loss)
        varied = _varied(runs)
        rule = min(rule_losses[family].values())
        found[family] = {
            "n_trials": len(runs),
            "varied": varied,
            "best": {"loss": _loss(best), "settings": {key: best.params.get(key, "") for key in varied}},
            "worst_loss": max(map(_loss, runs)),
            "rule_loss": rule,
            "gain": 1 - _loss(best) / rule,
        }
    return to_json(found)


def _varied(runs: list[StoredRun]) -> dict[str, list[str]]:
    """The values of every key of the configuration that differs between runs, in ascending order."""
    keys = sorted({key for run in runs for key in run.params if key.startswith(("model.", "train."))})
    values = {key: sorted({run.params.get(key, "") for run in runs}, key=_size) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}


def _size(value: str) -> float:
    try:
        return float(value)
    except ValueError:  # not set
        return -np.inf


def _loss(run: StoredRun) -> float:
    assert run.record is not None
    return run.record.val_loss_nats
