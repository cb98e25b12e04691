"""What commands show: progress on stderr, tables on stdout. Values in, text out; called by the command line only."""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lmu_dist.config import Config, Folder, PlanConfig
from lmu_dist.records import ENDED

if TYPE_CHECKING:  # heavy; a command has imported what it shows
    from lmu_dist.launch.jobs import Job
    from lmu_dist.launch.ladder import LadderResult
    from lmu_dist.launch.local import Part
    from lmu_dist.launch.submission import Package
    from lmu_dist.launch.tune import Search
    from lmu_dist.planning.cost import Plan
    from lmu_dist.planning.power import Power
    from lmu_dist.report.write import Written
    from lmu_dist.scaling.examine import Examination
    from lmu_dist.scaling.table import LeftOut
    from lmu_dist.tracking.progress import Row

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
WIDE = 160  # columns of a table that goes to a file or a pipe


def ladder(result: "LadderResult", tracking_uri: str) -> None:
    """The table of a ladder that has come to its end."""
    table = _table("family", "N", "tokens", "seed", "rate", "status", "validation nats", "bits/byte", "training s", "remark")
    for finished in result.finished:
        r = finished.record
        remarks = ["was done"] if finished.already_done else []
        remarks += ["second try at half the rate"] if r.retry_of else []
        table.add_row(
            r.family,
            f"{r.n_params:,}",
            f"{r.planned_tokens:,}",
            str(r.seed),
            f"{r.learning_rate:.2g}",
            r.status,
            f"{_number(r.val_loss_nats, '.4f')} +- {_number(r.val_loss_standard_error_nats, '.4f')}",
            _number(r.val_bits_per_byte, ".4f"),
            f"{r.training_seconds:.0f}",
            "; ".join([*remarks, *([r.stop_rule] if r.stop_rule else [])]),
        )
    _print(table)
    fresh = sum(not f.already_done for f in result.finished)
    print(f"{len(result.finished)} cells ended, {fresh} of them now; MLflow {tracking_uri}")
    for name, reason in result.failures.items():
        console.print(f"failed {name}: {reason}")


def tune(searches: "Sequence[Search]", winners: Folder, figure: Folder) -> None:
    """The tries of every search, best first."""
    for search in searches:
        keys = list(dict.fromkeys(key for trial in search.trials for key in trial.settings))
        print(f"{search.family}, N = {search.n_params:,}")
        table = _table("", *keys, "status", "tokens", "validation nats", "remark")
        for trial in search.trials:
            r = trial.record
            best = "best" if trial is search.best else ""
            drawn = [
                f"{trial.settings[key]:g}" if isinstance(trial.settings[key], float) else str(trial.settings[key])
                for key in keys
            ]
            table.add_row(best, *drawn, r.status, f"{r.tokens:,}", _number(r.val_loss_nats, ".4f"), r.stop_rule)
        _print(table)
        for reason in search.failures:
            console.print(f"failed: {reason}")
    print(f"winners  {winners}, for `include` in a ladder's configuration\nfigure   {figure}")


def package(package: "Package") -> None:
    """What a submission sends, and what it does not."""
    print(f"sends       {len(package.files):,} files, {_size(package.size_bytes)}, of {package.folder}")
    if package.left_out:
        names = sorted(package.left_out, key=lambda name: -package.left_out[name])
        some = ", ".join(f"{name} ({_size(package.left_out[name])})" for name in names[:5])
        print(f"leaves out  by .gitignore or .rayignore: {some}{f', and {len(names) - 5} more' if len(names) > 5 else ''}")


def jobs(rows: "Sequence[Job]") -> None:
    """The table of a cluster's jobs."""
    table = _table("job", "status", "started (UTC)", "time", "config", "commit", "remark")
    for row in rows:
        commit = row.git_commit[:8] + "+" * row.git_dirty
        started = row.started.removesuffix("+00:00").replace("T", " ")
        table.add_row(row.id, row.status, started, _duration(row.seconds), row.config, commit, row.message)
    _print(table)


def job(job: "Job") -> None:
    """How a job stands."""
    print(f"job         {job.id} {job.status} after {_duration(job.seconds)}{f': {job.message}' if job.message else ''}")


def log(text: str) -> None:
    """A piece of a log, as it came."""
    print(text, end="", flush=True)


def status(rows: "Callable[[], list[Row]]", live: bool) -> None:
    """The table of an experiment; kept up to date on a terminal until all of it has ended or Ctrl-C."""
    if not (live and sys.stdout.isatty()):
        _print(_status_table(rows()))
        return
    with Live(refresh_per_second=2, screen=False) as screen:
        while True:
            now = rows()
            screen.update(_status_table(now), refresh=True)
            if all(row.state in ENDED for row in now):
                return
            time.sleep(2)


def _status_table(rows: "Sequence[Row]") -> Table:
    table = _table("cell", "state", "tokens", "of", "loss", "tokens/s", "workers", "attempts", "ETA", "remark")
    for row in rows:
        table.add_row(
            row.name,
            row.state,
            f"{row.tokens:,}",
            f"{row.planned_tokens:,}",
            _number(row.loss_nats, ".4f"),
            _number(row.tokens_per_second, ",.0f"),
            str(row.n_workers or ""),
            str(row.attempts or ""),
            _duration(row.eta_seconds),
            row.remark,
        )
    done = sum(row.state in ENDED for row in rows)
    table.caption = f"{done} of {len(rows)} cells ended"
    return table


def plan(plan: "Plan", power: "Power", assumed: PlanConfig) -> None:
    """The table of a plan, its totals, and what it could tell."""
    table = _table(
        "family",
        "N",
        "N with head",
        "d",
        "q",
        "tokens",
        "seed",
        "steps",
        "FLOPs",
        "rate",
        "batch",
        "workers",
        "ZeRO",
        "GB",
        "time",
        "cost",
    )
    for line in plan.lines:
        stage = "none fits" if line.smallest_stage is None else str(line.smallest_stage)
        table.add_row(
            line.family,
            f"{line.n_params:,}",
            f"{line.n_params_with_head:,}",
            str(line.d_model),
            str(line.order or ""),
            f"{line.tokens:.3g}",
            str(line.seed),
            f"{line.steps:,}" + (f" ({line.shared_steps:,} shared)" if line.shared_steps else ""),
            f"{line.flops:.2e}",
            f"{line.learning_rate:.2g}",
            f"{line.batch_tokens:,}",
            str(line.n_workers),
            f"{line.zero_stage} (>= {stage})",
            " ".join(f"{b / 1e9:.2g}" for b in line.memory_bytes),
            _duration(line.seconds),
            _number(line.price, ",.2f"),
        )
    _print(table)
    each = f" of up to {plan.n_trials} trials" if plan.n_trials > 1 else ""
    print(f"{len(plan.lines)} cells{each}, {plan.flops:.3e} FLOPs; shared trunks save {plan.saved_share:.0%} of them")
    print("ZeRO: the stage set, and the smallest that fits plan.worker_memory_bytes; GB: of one worker at stages 0 1 2 3")
    for name in plan.left_out:
        print(f"left out, above ladder.max_cell_flops: {name}")
    if plan.worker_seconds is None:
        print("time: unknown; run plan --calibrate, or set plan.flops_per_second")
    else:
        calibrated = plan.device and not assumed.flops_per_second
        source = f"calibrated on {plan.device}" if calibrated else "from plan.flops_per_second"
        wall = f", {_duration(plan.wall_seconds)} on {plan.n_slots} at once" if plan.wall_seconds is not None else ""
        print(f"time: {_duration(plan.worker_seconds)} of one worker{wall} ({source})")
        print("on top of that come the start of the workers, some fifteen seconds for every trunk, and validation")
    if plan.price:
        print(f"cost: {plan.price:,.2f} at {assumed.price_per_worker_hour:g} per worker and hour")
    for text in power.lines():
        print(text)


def report(written: "Written", folder: Folder) -> None:
    """The answer of a report, and where it was put."""
    answer = written.answer.answer
    print(f"answer       {answer.verdict}. {answer.sentence}")
    for said in filter(None, (answer.others, answer.growth)):
        print(f"             {said}")
    for caveat in answer.caveats:
        print(f"             {caveat}")
    for fitted in written.answer.fits:
        checked = fitted.examination.certificate
        print(
            f"law          {fitted.family}: {'determined' if checked.ok else 'not determined: ' + '; '.join(checked.reasons)}"
        )
    print(f"runs         {len(written.study.runs):,} used, {len(written.study.left_out):,} left out")
    for reason, count in written.study.reasons().items():
        print(f"left out     {count:,} {reason}")
    for run_id in written.stale:
        print(f"stale now    report {run_id}, made from other runs")
    print(f"report       {folder / 'report.html'}; MLflow run {written.run_id}")


def fit(seen: "Examination", numbers: "Sequence[int]", left_out: "Sequence[LeftOut]") -> None:
    """A law of a table, its intervals, and what speaks for and against it."""
    for out in left_out:
        some = ", ".join(map(str, out.rows[:8])) + (", ..." if len(out.rows) > 8 else "")
        print(f"left out     {len(out.rows):,} rows: {out.reason} (rows {some})")
    print(f"law          {seen.form.__name__.lower()}, {seen.n_rows:,} rows")
    checked = seen.certificate
    if seen.law is None:
        print("NOT DETERMINED")
        for reason in checked.reasons:
            print(f"             {reason}")
        return
    table = _table("parameter", "value", "90 % interval", "by profile")
    for name, value in vars(seen.law).items():
        ends = [seen.intervals.get(name), seen.profiles.get(name)]
        table.add_row(name, f"{value:.6g}", *(f"{i[0]:.4g} .. {i[1]:.4g}" if i else "" for i in ends))
    _print(table)
    minimised = "; least squares of L was minimised, as its authors do" if seen.form.SQUARES else ""
    print(f"objective    {seen.objective:.7g}, sum of Huber terms of ln L{minimised}")
    print(
        f"certificate  good: {checked.n_agreeing} of {checked.n_starts} starts agree, gradient {checked.gradient:.1g}, "
        f"condition {checked.condition:.3g}; {seen.n_resamples:,} resamples"
    )
    if (held := seen.holdout) and held.mean_error is not None:
        print(
            f"holdout      without its {held.n_rows} run{'s' * (held.n_rows > 1)} the law predicts N = {held.n_params:,.0f} "
            f"{held.mean_error:+.2%} off on average, {held.worst_error:+.2%} at worst"
        )
    elif held:
        print(f"holdout      none: {'; '.join(held.reasons)}")
    moved = [f"row {numbers[i.row]}: {name} {i.without:.4g}" for name, i in seen.influence.items()]
    print(f"influence    without the run that matters most: {', '.join(moved)}")


def cluster(parts: "Sequence[Part]", exports: Mapping[str, str]) -> None:
    """A local cluster, as lines that a shell can be given: the variables, and the state in comments."""
    for part in parts:
        print(f"# {part.name:<9} {part.state:<7}{f' pid {part.pid}' if part.pid else ''}")
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}")
    print("unset RAY_AUTH_TOKEN  # it would go before the file")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        words = name in ("family", "cell", "state", "status", "remark", "parameter", "job", "config")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words or name in ("cell", "job"))
    return table


def _print(table: Table) -> None:
    out = Console(highlight=False, markup=False)
    Console(highlight=False, markup=False, width=None if out.is_terminal else WIDE).print(table)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else "-" if math.isnan(value) else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 50_000 else f"{n_bytes / 1e3:,.1f} kB"


class Bars:
    """Progress of long work: bars on a terminal; elsewhere a line every ten seconds, every thirty while nothing changes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks = progress, dict[str, TaskID]()
        self._printed, self._line = 0.0, ""

    def show(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Brings one bar up to date."""
        first = what not in self._tasks
        if first:
            self._tasks[what] = self._progress.add_task(what, total=total, detail=detail)
        self._progress.update(self._tasks[what], completed=done, total=total, detail=detail)
        line, now = f"{what} {done / (total or 1):.0%} {detail}", time.monotonic()
        if not console.is_terminal and (first or now - self._printed > (30 if line == self._line else 10)):
            self._printed, self._line = now, line
            console.print(line)

    def show_training(self, config: Config, latest: dict[str, float]) -> None:
        """The newest step of a run; before the first one, that its workers are starting."""
        if "train/loss_nats" not in latest:
            self.show("starting the workers", 0, 1)
            return
        speed = latest.get("speed/tokens_per_second", 0.0)
        validation = f", validation {latest['val/loss_nats']:.3f}" if "val/loss_nats" in latest else ""
        detail = f"loss {latest['train/loss_nats']:.3f}{validation} nats, {speed:,.0f} tokens/s"
        self.show("training", latest["train/tokens"], config.train.n_steps * config.train.batch_tokens, detail)


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress on stderr, gone when it is over."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bars(progress)
