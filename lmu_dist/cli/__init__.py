"""`lmu-dist`: parses, calls one function, prints. Run `lmu-dist --help`.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the fix; nothing was started), 3 a law is not determined.
"""

from collections.abc import Sequence

import click

from lmu_dist import show
from lmu_dist.cli import clusters, results, runs
from lmu_dist.cli.common import cli
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.storage import is_from_storage

__all__ = ["cli", "clusters", "main", "results", "runs"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script: the exit code."""
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
        show.console.print(f"lmu-dist: {e}; the same command goes on from where it stood")
        return 1
    except OSError as e:
        show.console.print(f"lmu-dist: {e}; mend that and start the same command again, it goes on from where it stood")
        return 1
    except (KeyboardInterrupt, click.Abort):
        show.console.print("lmu-dist: interrupted; the same command goes on from where it stood")
        return 1
    except Exception as e:
        if not is_from_storage(e):
            raise
        show.console.print(f"lmu-dist: the storage does not answer, or refuses: {' '.join(str(e).split())[:300]}")
        return 1
