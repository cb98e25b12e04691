"""From MLflow to a table: an experiment in, the runs a fit may see out, and those it may not, each with the reason.

A loss counts only if its run is complete and its schedule came to its end; losses meet in one fit only if data, sequence length
and training code are the same.
"""

import csv
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.records import COMPLETE, RunRecord
from lmu_dist.scaling.table import Rows, rows_of, rungs
from lmu_dist.tracking.store import STATUS, Store, record_of

# In the order in which they are shown.
FAMILIES = {"lmu": "LMU", "lmu_attention": "LMU with attention", "transformer": "transformer", "lstm": "LSTM"}
Settings = tuple[float, int, str, str]
FEWEST_TRUNKS = 20  # below, budgets are resampled each by itself


def title(family: str) -> str:
    """A family's name for people."""
    return FAMILIES.get(family, family)


@dataclass(frozen=True)
class Run:
    """A run with a result. `rung` is the size it is compared at: that of the smallest model within 5 %."""

    run_id: str
    name: str
    rung: int
    record: RunRecord


@dataclass(frozen=True)
class LeftOut:
    """A run that no fit sees, and why. `record` is None if it has no result."""

    run_id: str
    name: str
    reason: str
    record: RunRecord | None


@dataclass(frozen=True)
class Study:
    """What an experiment says: comparable, finished runs, and the others."""

    experiment: str
    source: str  # of the data, as configured
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    tries: Mapping[str, int]  # settings that a family tried at a size, at most; what is used is the best of so many

    @property
    def families(self) -> tuple[str, ...]:
        """Families that have runs, in the order they are shown in."""
        return tuple(sorted({run.record.family for run in self.runs}, key=_place))

    @property
    def rungs(self) -> tuple[int, ...]:
        """Sizes, ascending."""
        return tuple(sorted({run.rung for run in self.runs}))

    def of(self, family: str, rung: int | None = None) -> list[Run]:
        """Runs of a family, of one size if given."""
        return [run for run in self.runs if run.record.family == family and rung in (None, run.rung)]

    @property
    def digest(self) -> str:
        """Of all that fits are made from: another digest means that a report is stale."""
        facts = sorted((run.run_id, repr(run.record)) for run in self.runs)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def reasons(self) -> dict[str, int]:
        """How many runs were left out for what."""
        return dict(Counter(out.reason.split(":")[0] for out in self.left_out).most_common())


def rows(runs: Sequence[Run], with_head: bool = False) -> Rows:
    """Runs as a table: N without embeddings (Kaplan), or with the head (Porian)."""
    size = [r.record.n_params_with_head if with_head else r.record.n_params for r in runs]
    return rows_of(size, [r.record.tokens for r in runs], [r.record.val_loss_nats for r in runs])


def labels(runs: Sequence[Run]) -> list[str]:
    """What is resampled as one, in all families alike: a size and a seed, or these and a budget where trunks are few.

    The budgets of a size and seed share a trunk, so their errors are not independent; of a handful of trunks, though, no
    resample says anything.
    """
    trunks = [f"{r.rung}/{r.record.seed}" for r in runs]
    if len(set(trunks)) >= FEWEST_TRUNKS:
        return trunks
    return [f"{trunk}/{r.record.planned_tokens}" for trunk, r in zip(trunks, runs, strict=True)]


def collect(store: Store, experiment: str, any_code: bool = False) -> Study:
    """The study of an experiment. Cells of its plan that another experiment had done before are part of it.

    Raises ConfigError if there is no such experiment, or no run that could be used.
    """
    own, elsewhere, waiting = store.cells(experiment)
    used, out = list[Run](), [LeftOut("", cell["name"], "no result: planned, not begun", None) for cell in waiting]
    sources = dict[str, str]()
    for run in [*own, *elsewhere.values()]:
        record, name = record_of(run), run.data.tags.get("mlflow.runName", "")
        reason = _ineligible(record, run.data.tags.get(STATUS, "unknown"))
        if record is None or reason:
            out.append(LeftOut(run.info.run_id, name, reason, record))
        else:
            used.append(Run(run.info.run_id, name, 0, record))
            sources[run.info.run_id] = run.data.params.get("data.source", "unknown data")
    used, incomparable = _comparable(used, any_code)
    used, beaten, tries = _best(used)
    if not used:
        told = "; ".join(sorted({o.reason for o in out})[:4]) or "it has none"
        raise ConfigError(f"experiment {experiment!r} has no finished run to report on: {told}")
    sizes = rungs(np.array([run.record.n_params for run in used], np.float64))
    used = [replace(run, rung=int(size)) for run, size in zip(used, sizes, strict=True)]
    used.sort(key=lambda r: (_place(r.record.family), r.record.n_params, r.record.tokens, r.record.seed, r.run_id))
    left_out = sorted([*out, *incomparable, *beaten], key=lambda o: (o.reason, o.name, o.run_id))
    return Study(experiment, sources[used[0].run_id], tuple(used), tuple(left_out), tries)


def write_runs(path: Path, study: Study) -> None:
    """All runs as CSV, those left out with the reason and whatever is known of them."""
    columns = [f.name for f in fields(RunRecord)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run_id", "name", "rung", "left_out", *columns], restval="")
        writer.writeheader()
        for run in study.runs:
            writer.writerow({"run_id": run.run_id, "name": run.name, "rung": run.rung} | asdict(run.record))
        for out in study.left_out:
            known: dict[str, Any] = asdict(out.record) if out.record else {}
            writer.writerow({"run_id": out.run_id, "name": out.name, "left_out": out.reason} | known)


def _ineligible(record: RunRecord | None, status: str) -> str:
    """Why a run's loss is no result; empty if it is one."""
    if record is None:
        return f"no result: {status}, or recorded by another version"
    if record.status != COMPLETE:
        return f"{record.status.replace('_', ' ')}: {record.stop_rule}" if record.stop_rule else record.status.replace("_", " ")
    if record.phase != "decayed":
        return "undecayed: its schedule had not come to its end"
    if not (math.isfinite(record.val_loss_nats) and record.val_loss_nats > 0):
        return f"no loss: {record.val_loss_nats}"
    return ""


def _comparable(runs: Iterable[Run], any_code: bool) -> tuple[list[Run], list[LeftOut]]:
    """The largest set of runs on the same data, in rows of one length, by the same code; and the rest."""
    runs, out = list(runs), list[LeftOut]()
    asked = [("data", "data_digest"), ("sequence length", "sequence_tokens")] + ([] if any_code else [("code", "code_digest")])
    for what, name in asked:
        counts = Counter(getattr(run.record, name) for run in runs)
        if len(counts) < 2:
            continue
        common = max(sorted(counts), key=lambda value: counts[value])
        for run in runs:
            if (other := getattr(run.record, name)) != common:
                reason = f"other {what}: {str(other)[:12]}, most runs have {str(common)[:12]}"
                out.append(LeftOut(run.run_id, run.name, reason, run.record))
        runs = [run for run in runs if getattr(run.record, name) == common]
    return runs, out


def _best(runs: Iterable[Run]) -> tuple[list[Run], list[LeftOut], dict[str, int]]:
    """The runs of the best settings of each family and size; the others; how many settings a family tried at a size, at most.

    The same settings for all budgets and seeds: the best of each cell would be the luckiest of each. Best is what has the
    lowest loss at the largest budget.
    """
    sizes = defaultdict[tuple[str, int], dict[Settings, list[Run]]](lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.record.val_loss_nats, run.run_id)):
        sizes[run.record.family, run.record.n_params][_settings(run.record)].append(run)
    kept, out, tries = dict[tuple[Any, ...], Run](), list[LeftOut](), Counter[str]()
    for (family, _), tried in sizes.items():
        tries[family] = max(tries[family], len(tried))
        best = min(tried, key=lambda settings: _order(tried[settings]))
        for settings, found in tried.items():
            for run in found:
                r = run.record
                if settings != best:
                    why = f"not the best settings: rate {r.learning_rate:.3g}, batch {r.batch_tokens:,}"
                    out.append(LeftOut(run.run_id, run.name, why, r))
                elif (cell := (family, r.n_params, r.planned_tokens, r.seed)) in kept:
                    out.append(LeftOut(run.run_id, run.name, f"twice: {kept[cell].run_id} is the same cell", r))
                else:
                    kept[cell] = run
    return list(kept.values()), out, {family: tries[family] for family in sorted(tries, key=_place)}


def _settings(r: RunRecord) -> Settings:
    """What was chosen for a run beside its size, budget and seed. A second try at half the rate goes with the first."""
    return r.learning_rate * (2 if r.retry_of else 1), r.batch_tokens, r.schedule, r.precision


def _order(runs: Sequence[Run]) -> tuple[int, float]:
    """The largest budget first, then the lowest loss there."""
    most = max(run.record.planned_tokens for run in runs)
    return -most, min(run.record.val_loss_nats for run in runs if run.record.planned_tokens == most)


def _place(family: str) -> tuple[int, str]:
    return (list(FAMILIES).index(family) if family in FAMILIES else len(FAMILIES), family)
