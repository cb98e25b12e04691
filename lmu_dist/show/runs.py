"""Prints the runs of a ladder, of a search and of an experiment. Used by cli/."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

from lmu_dist.config import Folder
from lmu_dist.records import ENDED, NOT_NEEDED
from lmu_dist.show.console import console
from lmu_dist.show.tables import duration, fitted_table, new_table, number, print_table
from lmu_dist.tracking.pages import ui_hint

if TYPE_CHECKING:  # these imports are slow, and only needed for annotations
    from lmu_dist.launch.ladder_state import LadderResult
    from lmu_dist.launch.tune import SearchResult
    from lmu_dist.tracking.progress import Row

KEY_CHARACTERS = 12  # of a key, as in the names of runs; `generate` and `export` take it


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
            f"{number(r.val_loss_nats, '.4f')} +- {number(r.val_loss_standard_error_nats, '.4f')}",
            number(r.val_bits_per_byte, ".4f"),
            f"{r.training_seconds:.0f}",
            "; ".join([*remarks, *([r.stop_rule] if r.stop_rule else [])]),
        )
        rows.append(row)
    print_table(fitted_table((*names, "remark"), rows, ("training s", "bits/byte", "learning rate", "remark", "seed")))
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
                best, r.key[:KEY_CHARACTERS], *settings, r.status, f"{r.tokens:,}", number(r.val_loss_nats, ".4f"), r.stop_rule
            )
        print_table(table)
        for reason in search.failures:
            console.print(f"failed: {reason}")
    print(f"best settings  {winners} (add it under `include` to the configuration of a ladder)\nfigure         {figure}")


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
            number(row.loss_nats, ".4f"),
            number(row.tokens_per_second, ",.0f"),
            str(row.n_workers or ""),
            str(row.attempts or ""),
            duration(row.eta_seconds),
            row.remark,
        )
        for row in rows[:max_rows]
    ]
    table = fitted_table(names, cells, ("attempts", "workers", "remark", "tokens/s", "of", "ETA"))
    done = sum(row.state in ENDED for row in rows)
    captions = [f"{done} of {len(rows)} cells ended", str(table.caption) if table.caption else ""]
    captions += [f"{len(rows) - len(cells)} more cells: --once prints all"] if len(cells) < len(rows) else []
    table.caption = "; ".join(filter(None, captions))
    return table
