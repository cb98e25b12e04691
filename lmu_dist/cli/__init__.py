"""The command line `lmu-dist`: every command parses its arguments, calls one function and prints the result.

Exit codes: 0 success, 1 failure, 2 invalid input (one line says how to correct it; nothing was started), 3 the table does not
determine the law (`fit`).
"""

from collections.abc import Sequence

import click

from lmu_dist import show
from lmu_dist.cli import clusters, results, runs
from lmu_dist.cli.common import cli
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.storage import is_storage_client_error

__all__ = ["cli", "clusters", "main", "results", "runs"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. Entry point of the console script."""
    try:
        return cli.main(arguments, prog_name="lmu-dist", standalone_mode=False) or 0
    except click.ClickException as e:
        e.show()
        return 2
    except ConfigError as e:
        for line in str(e).splitlines():
            show.console.print(f"lmu-dist: {line}")
        return 2
    except FailedError as e:
        show.console.print(f"lmu-dist: {e}; run the same command again to continue")
        return 1
    except OSError as e:
        show.console.print(f"lmu-dist: {e}; correct this and run the same command again to continue")
        return 1
    except (KeyboardInterrupt, click.Abort):
        show.console.print("lmu-dist: interrupted; run the same command again to continue")
        return 1
    except Exception as e:
        if not is_storage_client_error(e):
            raise
        show.console.print(f"lmu-dist: the storage cannot be reached or refuses access: {' '.join(str(e).split())[:300]}")
        return 1
