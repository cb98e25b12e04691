"""The command line `lmu-dist`: every command parses its arguments, calls one function and prints the result.

Exit codes: 0 success, 1 failure, 2 invalid input (one line says how to correct it; nothing was started), 3 the table does not
determine the law (`fit`, `forecast`), 141 the reader of the output has ended.
"""

import sys
from collections.abc import Sequence

import click

from lmu_dist import garbage, show
from lmu_dist.cli import clean, clusters, fit, forecast, next_cell, process, restore, results, runs, ui
from lmu_dist.cli.common import cli
from lmu_dist.config import ConfigError, FailedError

__all__ = ["clean", "cli", "clusters", "fit", "forecast", "main", "next_cell", "restore", "results", "runs", "ui"]

READER_GONE = 141  # as shells report a program that a closed pipe ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. Entry point of the console script. Raises only what is a bug."""
    garbage.collect_rarely()
    with process.signals_like_ctrl_c(), process.only_results_on_stdout():
        try:
            code = cli.main(arguments, prog_name="lmu-dist", standalone_mode=False) or 0
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except BaseException as e:
            code = _report(process.remote_cause(e))
            if code is None:
                raise
            return code


def _report(error: BaseException) -> int | None:
    """Prints what a command failed of, and returns its exit code; None for a bug, which should show a traceback."""
    if isinstance(error, BrokenPipeError | SystemExit) and process.is_reader_gone():  # click turns the first into the second
        process.discard_stdout()
        return READER_GONE
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return _print("interrupted; run the same command again to continue", 1)
    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if isinstance(error, ConfigError):
        return _print(str(error), 2)
    if isinstance(error, FailedError):
        return _print(f"{error}; run the same command again to continue", 1)
    if message := process.outside_failure(error):
        return _print(f"{message}; run the same command again to continue", 1)
    if isinstance(error, OSError):
        return _print(f"{process.system_failure(error)} and run the same command again to continue", 1)
    return None


def _print(message: str, code: int) -> int:
    for line in message.splitlines():
        show.console.print(f"lmu-dist: {line}")
    return code
