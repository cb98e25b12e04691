"""Prints the results of commands: tables on stdout, progress on stderr. Used only by the command line."""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lmu_dist.config import Config, Folder, PlanConfig
from lmu_dist.records import ENDED, NOT_NEEDED
from lmu_dist.tracking.pages import ui_hint

if TYPE_CHECKING:  # these imports are slow, and only needed for annotations
    from lmu_dist.launch.jobs import ClusterJob
    from lmu_dist.launch.ladder import LadderResult
    from lmu_dist.launch.local import ClusterProcess
    from lmu_dist.launch.submission import Package
    from lmu_dist.launch.tune import SearchResult
    from lmu_dist.planning.cost import Plan
    from lmu_dist.planning.power import PowerEstimate
    from lmu_dist.report.write import ReportFiles
    from lmu_dist.scaling.read_table import RunTable
    from lmu_dist.scaling.table import Rows
    from lmu_dist.scaling.validate import FitResult
    from lmu_dist.tracking.progress import Row

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
KEY_CHARACTERS = 12  # of a key, as in the names of runs; `generate` and `export` take it
PROCESS_BYTES = 0.8e9  # resident memory of a worker without a model, for PyTorch, DeepSpeed and Ray
WORST_ROWS = 3  # whose loss a law misses most, as `fit` prints them
LONG = 500  # rows of a table that is printed plainly
FEW = 200  # things, of which each has a line of its own when it is done
WRAPPED_CHARACTERS = 20  # width of a column whose text is wrapped
TABLE_WIDTH_WITHOUT_TERMINAL = 400  # in characters, for output to a file or a pipe


def print_json(facts: Any) -> None:
    """Prints a result as JSON. A number that JSON lacks, such as the loss of a run that diverged, is null."""
    print(json.dumps(_finite(facts), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_ladder(result: "LadderResult", tracking_uri: str) -> None:
    """Prints the table of a finished ladder."""
    names = ("key", "family", "N", "tokens", "seed", "learning rate", "status", "val. loss, nats", "bits/byte", "training s")
    rows = list[tuple[str, ...]]()
    for finished in result.finished:
        r = finished.record
        remarks = ["done before"] if finished.already_done else []
        remarks += [f"{r.epochs:.3g} epochs"] if r.repeats_data else []
        remarks += ["retry at half the learning rate"] if r.retry_of else []
        row = (
            r.key[:KEY_CHARACTERS],
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
        rows.append(row)
    print_table(_fitted_table((*names, "remark"), rows, ("training s", "bits/byte", "learning rate", "remark", "seed")))
    n_new = sum(not f.already_done for f in result.finished)
    print(f"{len(result.finished)} cells ended, {n_new} of them in this call; MLflow {tracking_uri}")
    if result.finished:
        print(f"loss curves: {ui_hint(result.finished[0].cell.config.experiment)}")
    for name, reason in result.failures.items():
        console.print(f"failed: {name}: {reason}")
    if result.failures:
        console.print("run the same command again to continue with the cells that failed")


def print_tune(searches: "Sequence[SearchResult]", winners: Folder, figure: Folder) -> None:
    """Prints the trials of every search, best first."""
    for search in searches:
        keys = list(dict.fromkeys(key for trial in search.trials for key in trial.settings))
        print(f"{search.family}, N = {search.n_params:,}")
        table = new_table("", "key", *keys, "status", "tokens", "val. loss, nats", "remark")
        for trial in search.trials:
            r = trial.record
            best = "best" if trial is search.best else ""
            settings = [
                f"{trial.settings[key]:g}" if isinstance(trial.settings[key], float) else str(trial.settings[key])
                for key in keys
            ]
            table.add_row(
                best, r.key[:KEY_CHARACTERS], *settings, r.status, f"{r.tokens:,}", _number(r.val_loss_nats, ".4f"), r.stop_rule
            )
        print_table(table)
        for reason in search.failures:
            console.print(f"failed: {reason}")
    print(f"best settings  {winners} (add it under `include` to the configuration of a ladder)\nfigure         {figure}")


def print_package(package: "Package") -> None:
    """Prints which files a submission uploads, and which it leaves out."""
    print(f"uploads     {len(package.files):,} files, {_size(package.size_bytes)}, from {package.folder}")
    if package.left_out:
        names = sorted(package.left_out, key=lambda name: -package.left_out[name])
        some = ", ".join(f"{name} ({_size(package.left_out[name])})" for name in names[:5])
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"left out    ignored by git or Ray, or results: {some}{more}")


def print_jobs(rows: "Sequence[ClusterJob]") -> None:
    """Prints the table of the jobs of a cluster."""
    table = new_table("job", "status", "started (UTC)", "time", "config", "commit", "remark")
    for row in rows:
        commit = row.git_commit[:8] + "+" * row.git_dirty
        started = row.started.removesuffix("+00:00").replace("T", " ")
        table.add_row(row.id, row.status, started, _duration(row.seconds), row.config, commit, row.message)
    print_table(table)


def print_job(job: "ClusterJob") -> None:
    """Prints the status of a job."""
    print(f"job         {job.id} {job.status} after {_duration(job.seconds)}{f': {job.message}' if job.message else ''}")


def print_log(text: str) -> None:
    """Prints a piece of a log unchanged."""
    print(text, end="", flush=True)


def print_status(rows: "Callable[[], list[Row]]", live: bool) -> None:
    """Prints the cells of an experiment. On a terminal the table is updated until all cells have ended or Ctrl-C."""
    if not (live and sys.stdout.isatty()):
        print_table(_status_table(rows()))
        return
    with Live(refresh_per_second=2, screen=False) as screen:
        while True:
            now = rows()
            screen.update(_status_table(now, max(1, screen.console.height - 3)), refresh=True)
            if all(row.state in (*ENDED, NOT_NEEDED) for row in now):
                return
            time.sleep(2)


def _status_table(rows: "Sequence[Row]", max_rows: int | None = None) -> Table:
    """The table of the cells, of which the first `max_rows` are shown: those that have ended are the last."""
    names = ("cell", "state", "tokens", "of", "loss", "tokens/s", "workers", "attempts", "ETA", "remark")
    cells = [
        (
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
        for row in rows[:max_rows]
    ]
    table = _fitted_table(names, cells, ("attempts", "workers", "remark", "tokens/s", "of", "ETA"))
    done = sum(row.state in ENDED for row in rows)
    captions = [f"{done} of {len(rows)} cells ended", str(table.caption) if table.caption else ""]
    captions += [f"{len(rows) - len(cells)} more cells: --once prints all"] if len(cells) < len(rows) else []
    table.caption = "; ".join(filter(None, captions))
    return table


def print_plan(plan: "Plan", power: "PowerEstimate", assumed: PlanConfig) -> None:
    """Prints the table of a plan, its totals, and the statistical power of the study."""
    names = ("family", "N", "N with head", "d", "q", "tokens", "seed", "steps", "FLOPs", "executed", "rate", "batch", "workers")
    rows = list[tuple[str, ...]]()
    for line in plan.cells:
        stage = "none" if line.smallest_stage is None else str(line.smallest_stage)
        row = (
            line.family,
            f"{line.n_params:,}",
            f"{line.n_params_with_head:,}",
            str(line.d_model),
            str(line.widths.get("order", "")),
            f"{line.tokens:.3g}",
            str(line.seed),
            f"{line.steps:,}" + (f" ({line.shared_steps:,} shared)" if line.shared_steps else ""),
            f"{line.flops:.2e}",
            f"{line.executed_flops:.2e}",
            " > ".join(dict.fromkeys(f"{rate:.2g}" for rate in (line.first_learning_rate, line.learning_rate))),
            f"{line.batch_tokens:,}",
            str(line.n_workers),
            f"{line.zero_stage} (>= {stage})",
            " ".join(f"{b / 1e9:.2g}" for b in line.memory_bytes),
            _duration(line.seconds),
            _number(line.price, ",.2f"),
        )
        rows.append(row)
    optional = ("cost", "N with head", "executed", "seed", "q", "rate", "d", "batch", "steps", "ZeRO", "workers", "GB")
    print_table(_fitted_table((*names, "ZeRO", "GB", "time", "cost"), rows, optional))
    each = f" of up to {plan.n_trials} trials" if plan.n_trials > 1 else ""
    print(
        f"{len(plan.cells)} cells{each}, {plan.flops:.3e} FLOPs, {plan.executed_flops:.3e} executed; "
        f"shared trunks save {plan.saved_share:.0%} of them"
    )
    print(
        "ZeRO: configured stage (>= smallest that fits plan.worker_memory_bytes)\n"
        "GB: memory of one worker at stages 0 1 2 3, for the model, its optimizer and its activations; a worker on CPUs needs "
        f"about {PROCESS_BYTES / 1e9:.1f} GB more, for Python and its libraries"
    )
    if offloaded := max(line.host_bytes for line in plan.cells):
        print(f"offload: up to {offloaded / 1e9:.2g} GB more of the CPU's memory for each worker, for the optimizer")
    for note in plan.notes:
        print(note)
    for name in plan.left_out:
        print(f"left out, because it exceeds ladder.max_cell_flops: {name}")
    if plan.worker_seconds is None:
        print("time: unknown; run `plan --calibrate` or set plan.flops_per_second")
    else:
        calibrated = plan.device and not assumed.flops_per_second
        source = f"measured on {plan.device}" if calibrated else "from plan.flops_per_second"
        wall = (
            f", {_duration(plan.wall_seconds)} with {plan.n_slots} workers at a time" if plan.wall_seconds is not None else ""
        )
        print(f"time: {_duration(plan.worker_seconds)} of a single worker{wall} ({source})")
        print("This excludes validation and the start of the workers, about 15 seconds per trunk.")
    if plan.price:
        print(f"cost: {plan.price:,.2f} at {assumed.price_per_worker_hour:g} per worker-hour")
    for text in power.lines():
        print(text)


def print_report(written: "ReportFiles", folder: Folder) -> None:
    """Prints the answer of a report, which laws are determined, and where the report is."""
    answer = written.results.answer
    print(f"answer       {answer.verdict}. {answer.sentence}")
    for sentence in filter(None, (answer.others, answer.growth)):
        print(f"             {sentence}")
    for caveat in answer.caveats:
        print(f"             {caveat}")
    for fitted in written.results.fits:
        diagnostics = fitted.result.diagnostics
        verdict = "determined" if diagnostics.passed else f"not determined: {'; '.join(diagnostics.reasons)}"
        print(f"law          {fitted.family}: {verdict}")
        if supported := [law.name for law in fitted.comparison.supported if fitted.comparison.fits]:
            print(f"             laws that its runs support: {', '.join(supported)}")
    forecasts = written.forecasts
    if forecasts.scores:
        inside = (
            f"; {forecasts.n_inside} of {len(forecasts.counted)} losses inside of their intervals" if forecasts.counted else ""
        )
        print(f"forecasts    {len(forecasts.scores):,}, {len(forecasts.counted):,} scored{inside}")
    print(f"runs         {len(written.study.runs):,} used, {len(written.study.left_out):,} left out")
    for reason, count in written.study.left_out_counts().items():
        print(f"left out     {count:,} {reason}")
    for run_id in written.stale:
        print(f"stale now    report {run_id}, which was made from other runs")
    in_mlflow = f"; MLflow run {written.run_id}" if written.run_id else ""
    print(f"report       {folder / 'report.html'}{in_mlflow}")


def print_table_notes(table: "RunTable") -> None:
    """Prints how unusual cells of a user's table were read, and which rows are left out."""
    for note in table.notes:
        print(f"table        {note}")
    for out in table.left_out:
        some = ", ".join(map(str, out.rows[:8])) + (", ..." if len(out.rows) > 8 else "")
        plural = "s" * (len(out.rows) != 1)
        print(f"left out     {len(out.rows):,} row{plural}: {out.reason} (row{plural} {some})")


def print_fit(result: "FitResult", rows: "Rows", numbers: "Sequence[int]") -> None:
    """Prints a law fitted to a table, its intervals and its diagnostics; `numbers` has the numbers of the rows in the file."""
    print(f"law          {result.form.__name__.lower()}, {result.n_rows:,} rows")
    unique = ", U unique tokens" if result.form.NEEDS_UNIQUE else ""
    print(f"formula      {result.form.FORMULA}; N parameters, D training tokens{unique}, L nats per token")
    for warning in result.warnings:
        print(f"warning      {warning}")
    if result.misfit:
        print(f"misses       {result.misfit.typical_miss:.2%} at the median; the largest:")
        for i, miss in list(zip(result.misfit.worst_rows, result.misfit.misses, strict=True))[:WORST_ROWS]:
            n, d, loss = rows.n_params[i], rows.tokens[i], rows.loss[i]
            print(f"             {miss:+.2%} row {numbers[i]}: N {n:,.12g}, D {d:,.12g}, loss {loss:.6g}")
    diagnostics = result.diagnostics
    if result.law is None:
        print("NOT DETERMINED")
        for reason in diagnostics.reasons:
            print(f"             {reason}")
        return
    table = new_table("parameter", "value", "90 % interval", "profile interval")
    for name, value in vars(result.law).items():
        ends = [result.intervals.get(name), result.profiles.get(name)]
        table.add_row(name, f"{value:.6g}", *(f"{i[0]:.4g} .. {i[1]:.4g}" if i else "" for i in ends))
    print_table(table)
    note = "; the fit minimised squared errors of L, as the authors of this law do" if result.form.LEAST_SQUARES else ""
    print(f"objective    {result.objective:.7g}, sum of Huber losses of ln L{note}")
    print(
        f"diagnostics  all checks passed: {diagnostics.n_agreeing} of {diagnostics.n_starts} starts found the same optimum, "
        f"relative gradient {diagnostics.gradient:.1g}, condition number {diagnostics.condition:.3g}; "
        f"{result.n_resamples:,} resamples"
    )
    if (holdout := result.holdout) and holdout.mean_error is not None:
        held_out = f"{holdout.n_rows} run{'s' * (holdout.n_rows > 1)} at N = {holdout.n_params:,.0f}"
        print(
            f"holdout      a fit without the {held_out} predicts their loss with a mean error of {holdout.mean_error:+.2%}, "
            f"the largest is {holdout.worst_error:+.2%}"
        )
    elif holdout:
        print(f"holdout      none: {'; '.join(holdout.reasons)}")
    moved = [f"{name} {i.without:.4g} (row {numbers[i.row]})" for name, i in result.influence.items()]
    if moved:
        print(f"influence    without the most influential row: {', '.join(moved)}")


def print_cluster(processes: "Sequence[ClusterProcess]", exports: Mapping[str, str]) -> None:
    """Prints a local cluster as shell lines: its environment variables, and the state of its processes as comments."""
    for process in processes:
        print(f"# {process.name:<9} {process.state:<7}{f' pid {process.pid}' if process.pid else ''}")
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}")
    print("unset RAY_AUTH_TOKEN  # it would take precedence over the token file")


def new_table(*columns: str) -> Table:
    """Returns an empty table with these columns; columns of numbers are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        words = name in ("family", "cell", "state", "status", "remark", "parameter", "job", "config", "key")
        table.add_column(
            name, justify="left" if words else "right", no_wrap=not words or name in ("family", "cell", "job", "key")
        )
    return table


def _fitted_table(names: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str]) -> Table:
    """A table for this terminal. If it is too narrow, columns are left out, the first of `optional` first, as a caption says.

    So what is shown is complete, such as the names of runs.
    """
    widths = {name: max(map(cell_len, column)) for name, *column in zip(names, names, *rows, strict=True)}
    widths |= {name: min(width, WRAPPED_CHARACTERS) for name, width in widths.items() if name == "remark"}
    left_out, kept = list[str](), list(names)
    for name in optional if _result_console().is_terminal else ():
        if sum(widths[kept_name] + 2 for kept_name in kept) - 2 <= _result_console().width:
            break
        kept.remove(name)
        left_out.append(name)
    table = new_table(*kept)
    for row in rows:
        table.add_row(*(value for name, value in zip(names, row, strict=True) if name in kept))
    if left_out:
        table.caption = f"not shown on a terminal of this width: {', '.join(left_out)}"
    return table


def _result_console() -> Console:
    """The console of stdout, which commands may replace."""
    return Console(highlight=False, markup=False, emoji=False)


def print_table(table: Table) -> None:
    """Prints a table as wide as it is where the output is no terminal."""
    if table.row_count > LONG:
        _print_plainly(table)
        return
    out = _result_console()
    Console(highlight=False, markup=False, emoji=False, width=None if out.is_terminal else TABLE_WIDTH_WITHOUT_TERMINAL).print(
        table
    )


def _print_plainly(table: Table) -> None:
    """Prints a table of thousands of rows, for which rich takes seconds. Nothing is wrapped."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    for texts, column in zip(columns, table.columns, strict=True):
        width = max(map(cell_len, texts))
        for i, text in enumerate(texts):
            padding = " " * (width - cell_len(text))
            texts[i] = text + padding if column.justify == "left" else padding + text
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())
    if table.caption:
        print(table.caption)


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


class ProgressBars:
    """Shows progress: bars on a terminal; elsewhere a line every ten seconds, or every thirty while nothing changes.

    Elsewhere there is also a line for each of a few things that are done, such as the cells of a ladder.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks, self._done = progress, dict[str, TaskID](), dict[str, float]()
        self._last_print_time, self._last_line = 0.0, ""

    def update(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Updates the bar with this label."""
        first = what not in self._tasks
        if first:
            self._tasks[what] = self._progress.add_task(what, total=total, detail=detail)
        self._progress.update(self._tasks[what], completed=done, total=total, detail=detail)
        line, now = f"{what} {done / (total or 1):.0%} {detail}", time.monotonic()
        counted = 1 < total <= FEW and done != self._done.get(what)
        self._done[what] = done
        if console.is_terminal:
            return
        if first or counted or now - self._last_print_time > (30 if line == self._last_line else 10):
            self._last_print_time, self._last_line = now, line
            console.print(line)

    def update_training(self, config: Config, latest: dict[str, float]) -> None:
        """Shows the latest step of a run, or, before the first step, that its workers are starting."""
        if "train/loss_nats" not in latest:
            self.update("starting the workers", 0, 1)
            return
        speed = latest.get("speed/tokens_per_second", 0.0)
        validation = f", validation {latest['val/loss_nats']:.3f}" if "val/loss_nats" in latest else ""
        detail = f"loss {latest['train/loss_nats']:.3f}{validation} nats, {speed:,.0f} tokens/s"
        self.update("training", latest["train/tokens"], config.train.n_steps * config.train.batch_tokens, detail)


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Shows progress on stderr while the context is open; the bars are removed at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield ProgressBars(progress)
