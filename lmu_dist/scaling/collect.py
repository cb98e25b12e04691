"""Selects the runs of an experiment: those a fit may use, and those left out, each with the reason.

A run is used only if it is complete and its learning-rate schedule reached its end. Runs are compared only if data, sequence
length and the versions of family and training are the same.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.records import COMPLETE, Appearance, RunRecord
from lmu_dist.scaling.appearance import family_order, fill_in_colours_and_markers, stored_appearance, title
from lmu_dist.scaling.settings import Settings, difference, settings_of, with_widths
from lmu_dist.scaling.table import Rows, budget_bins, rows_from_columns, size_bins
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.stored_runs import SOURCE, StoredRuns, read_runs


@dataclass(frozen=True)
class Run:
    """A run with a result.

    `size_bin` is the size at which it is compared: the smallest N of the runs within 5 %. `requested_n_params` is the N that
    was asked for (0: unknown), of which models with other widths, for example of another order, differ by up to 2 %.
    `budget_bin` is the budget at which it is compared: the fewest planned tokens of the runs that `budget_bins` puts together.
    """

    run_id: str
    name: str
    size_bin: int
    record: RunRecord
    settings: Settings = ()
    requested_n_params: int = 0
    ended_ms: int = 0  # since 1970
    budget_bin: int = 0


@dataclass(frozen=True)
class LeftOutRun:
    """A run that fits do not use, and the reason. `record` is None if the run has no result."""

    run_id: str
    name: str
    reason: str
    record: RunRecord | None


@dataclass(frozen=True)
class Study:
    """The runs of an experiment: those that are finished and comparable, and those left out."""

    experiment: str
    source: str  # of the data, as configured
    runs: tuple[Run, ...]
    left_out: tuple[LeftOutRun, ...]
    n_settings_tried: Mapping[str, int]  # per family the most settings tried at one size; the best of them is used

    appearances: Mapping[str, Appearance]  # how reports show each family

    def title(self, family: str) -> str:
        """Returns the display name of a family."""
        return self.appearances[family].title if family in self.appearances else title(family)

    @property
    def families(self) -> tuple[str, ...]:
        """Families that have runs, in display order."""
        return tuple(sorted({run.record.family for run in self.runs}, key=family_order))

    @property
    def size_bins(self) -> tuple[int, ...]:
        """Size bins, ascending."""
        return tuple(sorted({run.size_bin for run in self.runs}))

    def runs_of(self, family: str, size_bin: int | None = None) -> list[Run]:
        """Returns the runs of a family; only those of one size bin if it is given."""
        return [run for run in self.runs if run.record.family == family and size_bin in (None, run.size_bin)]

    @property
    def digest(self) -> str:
        """Digest of the runs that the fits use. If it changes, earlier reports are stale."""
        facts = sorted((run.run_id, repr(_set_fields(run.record))) for run in self.runs)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def versions(self) -> str:
        """The versions that made the runs, as in "lmu 1, transformer 2, training 1"."""
        made_by = {family: {run.record.versions[0] for run in self.runs_of(family)} for family in self.families}
        made_by["training"] = {run.record.versions[1] for run in self.runs}
        return ", ".join(f"{what} {' and '.join(sorted(found))}" for what, found in made_by.items())

    def left_out_counts(self) -> dict[str, int]:
        """Returns how many runs were left out for each reason, most frequent first."""
        return dict(Counter(out.reason.split(":")[0] for out in self.left_out).most_common())


def rows_from_runs(runs: Sequence[Run], with_head: bool = False) -> Rows:
    """Returns the runs as a table, with N without embeddings (Kaplan) or with the output head (Porian)."""
    size = [r.record.n_params_with_head if with_head else r.record.n_params for r in runs]
    return rows_from_columns(size, [r.record.tokens for r in runs], [r.record.val_loss_nats for r in runs])


def resampling_groups(runs: Sequence[Run]) -> list[str]:
    """Returns a label per run; runs with the same label share a part of their noise, and families are resampled in pairs.

    Runs of one size and seed share a trunk, so their errors are not independent and they form one group.
    """
    return [f"{r.size_bin}/{r.record.seed}" for r in runs]


def collect(store: Store, experiment: str, any_code: bool = False) -> Study:
    """Returns the study of an experiment, including cells of its plan that another experiment had already trained.

    Raises ConfigError if the experiment does not exist or has no run that can be used.
    """
    return select_runs(read_runs(store, experiment), any_code)


def select_runs(stored: StoredRuns, any_code: bool = False) -> Study:
    """Returns the study that the stored runs make. Raises ConfigError if none of them can be used."""
    used, out = list[Run](), [LeftOutRun("", name, "no result: planned, not started", None) for name in stored.not_started]
    sources, appearances = dict[str, str](), dict[str, Appearance]()
    for run in sorted(stored.runs, key=lambda run: (run.ended_ms, run.run_id)):  # the latest appearance of a family counts
        record = run.record
        reason = _reason_to_leave_out(record, run.status)
        if record is None or reason:
            out.append(LeftOutRun(run.run_id, run.name, reason, record))
        else:
            requested = int(run.params.get("model.n_params", record.n_params))
            settings = settings_of(record, run.params)
            used.append(Run(run.run_id, run.name, 0, record, settings, requested, run.ended_ms))
            appearances[record.family] = stored_appearance(record.family, run.appearance)
            sources[run.run_id] = run.params.get(SOURCE, "unknown data")
    used, incomparable = _comparable(used, any_code)
    used, beaten, n_settings_tried = _keep_best_settings(used)
    if not used:
        reasons = "; ".join(sorted({o.reason for o in out})[:4]) or "it has no runs"
        raise ConfigError(f"experiment {stored.experiment!r} has no finished run to report on: {reasons}")
    sizes = size_bins(np.array([run.record.n_params for run in used], np.float64))
    budgets = _budget_bins(used)
    used = [replace(run, size_bin=int(n), budget_bin=d) for run, n, d in zip(used, sizes, budgets, strict=True)]
    used.sort(key=lambda r: (family_order(r.record.family), r.record.n_params, r.record.tokens, r.record.seed, r.run_id))
    left_out = sorted([*out, *incomparable, *beaten], key=lambda o: (o.reason, o.name, o.run_id))
    found = {family: appearances[family] for family in sorted({run.record.family for run in used}, key=family_order)}
    return Study(
        stored.experiment,
        sources[used[0].run_id],
        tuple(used),
        tuple(left_out),
        n_settings_tried,
        fill_in_colours_and_markers(found),
    )


def _set_fields(record: RunRecord) -> list[tuple[str, Any]]:
    """The fields that differ from their defaults: a field that is added to RunRecord changes no digest of older runs."""
    values = [(f.name, getattr(record, f.name), f.default) for f in fields(record) if f.name != "unknown"]
    return [(name, value) for name, value, default in values if repr(value) != repr(default)]


def _reason_to_leave_out(record: RunRecord | None, status: str) -> str:
    """Returns why a run cannot be used; empty if it can."""
    if record is None:
        return f"no result: {status}, or recorded by another version of lmu-dist"
    if record.status != COMPLETE:
        return f"{record.status.replace('_', ' ')}: {record.stop_rule}" if record.stop_rule else record.status.replace("_", " ")
    if record.phase != "decayed":
        return "undecayed: its learning-rate schedule did not reach its end"
    if not (math.isfinite(record.val_loss_nats) and record.val_loss_nats > 0):
        return f"no valid loss: {record.val_loss_nats}"
    return ""


def _comparable(runs: Iterable[Run], any_code: bool) -> tuple[list[Run], list[LeftOutRun]]:
    """Returns the largest set of runs with the same data, sequence length and versions; and the runs left out.

    The version of the training must be the same for all, that of a family for its own runs. `any_code`: versions may differ.
    """
    kept, out = _most_common(list(runs), "data", lambda r: r.data_digest)
    kept, more = _most_common(kept, "sequence length", lambda r: str(r.sequence_tokens))
    out += more
    kept, more = _most_common(kept, "rows of the validation split", lambda r: r.validation_rows or "first or all")
    out += more
    if any_code:
        return kept, out
    kept, more = _most_common(kept, "training version", lambda r: r.versions[1])
    out += more
    same = list[Run]()
    for family in {run.record.family: None for run in kept}:
        of_family = [run for run in kept if run.record.family == family]
        found, more = _most_common(of_family, f"version of {title(family)}", lambda r: r.versions[0])
        same += found
        out += more
    return same, out


def _most_common(runs: list[Run], what: str, value: Callable[[RunRecord], str]) -> tuple[list[Run], list[LeftOutRun]]:
    """Returns the runs that have the most common value, the greater of two that are equally common; and the runs left out."""
    counts = Counter(value(run.record) for run in runs)
    common = max(sorted(counts, key=lambda v: (len(v), v)), key=lambda v: (counts[v], len(v), v), default="")
    kept = [run for run in runs if value(run.record) == common]
    out = [
        LeftOutRun(run.run_id, run.name, f"other {what}: {value(run.record)[:12]}, most runs have {common[:12]}", run.record)
        for run in runs
        if value(run.record) != common
    ]
    return kept, out


def _keep_best_settings(runs: Iterable[Run]) -> tuple[list[Run], list[LeftOutRun], dict[str, int]]:
    """Returns the runs with the best settings per family and size, the runs left out, and per family the most settings tried.

    The best settings have the lowest mean loss at the largest budget, as `_best_at` says. They hold for all budgets and seeds
    of a size: choosing the best run of every cell would select for luck.
    """
    sizes = defaultdict[tuple[str, int], dict[Settings, list[Run]]](lambda: defaultdict(list))
    # Runs whose widths are recorded come first, so that an older run of the same settings joins them.
    for run in sorted(runs, key=lambda run: (not run.record.widths, run.record.val_loss_nats, run.run_id)):
        tried = sizes[run.record.family, run.requested_n_params]
        tried[with_widths(run.settings, tried)].append(run)
    kept, out, n_settings_tried = dict[tuple[Any, ...], Run](), list[LeftOutRun](), Counter[str]()
    for (family, n_params), tried in sizes.items():
        n_settings_tried[family] = max(n_settings_tried[family], len(tried))
        of_size = [run for found in tried.values() for run in found]
        budgets = {run.run_id: budget for run, budget in zip(of_size, _budget_bins(of_size), strict=True)}
        most = max(budgets.values())
        best = _best_at(most, tried, budgets)
        for settings, found in tried.items():
            remark = ""
            if all(budgets[run.run_id] < most for run in found):
                remark = f"; only settings with the largest budget, {most:,} tokens, are compared"
            for run in found:
                r = run.record
                if settings != best:
                    reason = f"not the best settings: {difference(settings, best)}{remark}"
                    out.append(LeftOutRun(run.run_id, run.name, reason, r))
                elif (cell := (family, n_params, r.planned_tokens, r.seed)) in kept:
                    out.append(LeftOutRun(run.run_id, run.name, f"duplicate: run {kept[cell].run_id} is the same cell", r))
                else:
                    kept[cell] = run
    return list(kept.values()), out, {family: n_settings_tried[family] for family in sorted(n_settings_tried, key=family_order)}


def _best_at(budget: int, tried: Mapping[Settings, Sequence[Run]], budgets: Mapping[str, int]) -> Settings:
    """Returns the settings with the lowest mean ln L at a budget (tokens; `budgets` has that of every run, by run id).

    Two settings are compared over the seeds that both have, or over all if they share none: the lowest of several seeds would
    favour the settings with more of them. The best ones lose fewest of these comparisons; of equals the mean over all decides.
    """
    by_seed = dict[Settings, dict[int, float]]()
    for settings, runs in tried.items():
        losses = defaultdict[int, list[float]](list)
        for run in runs:
            if budgets[run.run_id] == budget:
                losses[run.record.seed].append(float(np.log(run.record.val_loss_nats)))
        if losses:
            by_seed[settings] = {seed: float(np.mean(of_seed)) for seed, of_seed in losses.items()}

    def mean(settings: Settings, seeds: Iterable[int]) -> float:
        return float(np.mean([by_seed[settings][seed] for seed in sorted(seeds)]))

    def is_beaten(settings: Settings, other: Settings) -> bool:
        shared = by_seed[settings].keys() & by_seed[other].keys()
        return mean(settings, shared or by_seed[settings]) > mean(other, shared or by_seed[other])

    return min(by_seed, key=lambda s: (sum(is_beaten(s, other) for other in by_seed), mean(s, by_seed[s])))


def _budget_bins(runs: Sequence[Run]) -> list[int]:
    """Returns the budget of every run in tokens: settings or families with other batches have the same one."""
    planned = np.array([run.record.planned_tokens for run in runs], np.float64)
    batch = np.array([run.record.batch_tokens for run in runs], np.float64)
    return [int(budget) for budget in budget_bins(planned, batch)]
