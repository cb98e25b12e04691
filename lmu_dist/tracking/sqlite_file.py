"""The SQLite file of a local MLflow store: whether it is locked, and whether this MLflow can open it.

MLflow migrates the tables of an older version as soon as it opens the file, and the older version refuses the file afterwards.
So a copy is kept. Called by store, before MLflow opens the file; nothing here creates one.
"""

import logging
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

import mlflow
from alembic.script import ScriptDirectory
from filelock import FileLock
from mlflow.db import upgrade
from mlflow.store import db_migrations

from lmu_dist.config import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "sqlite:///"
LOCK_SECONDS = 2.0  # how long to wait for a file that another process has locked


def path_of(uri: str) -> Path | None:
    """The file of an SQLite store, as an absolute path; None for any other store."""
    return Path(uri.removeprefix(PREFIX).partition("?")[0]).absolute() if uri.startswith(PREFIX) else None


def revision_of(path: Path) -> str | None:
    """The revision of MLflow's tables in a file; None if the file does not exist or has none. Raises sqlite3.Error."""
    if not path.exists():
        return None
    with closing(_connect(path)) as connection:
        try:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError as e:
            if "no such table" in str(e):
                return None
            raise
    return row[0] if row else None


def is_no_database(error: BaseException | None) -> bool:
    """Whether an error of SQLite says that the file is no database, or a damaged one: waiting does not help."""
    return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def migrate(path: Path) -> None:
    """Migrates a file of an older MLflow to this one, after copying it to PATH.before-VERSION. Does nothing for other files.

    Raises ConfigError if a newer MLflow wrote it, sqlite3.Error if it is locked or damaged, OSError if it cannot be copied.
    """
    if (revision := revision_of(path)) is None:
        return
    scripts = ScriptDirectory(str(Path(db_migrations.__file__).parent))
    if revision in scripts.get_heads():
        return
    if revision not in {script.revision for script in scripts.walk_revisions()}:
        raise ConfigError(
            f"the MLflow store {path} was written by a newer MLflow than the installed {mlflow.__version__} (its tables have "
            f"revision {revision}); install that version, or set MLFLOW_TRACKING_URI to another store"
        )
    lock = Path(f"{path}.migration.lock")
    with FileLock(lock):
        if revision_of(path) == revision:  # else another process has migrated it meanwhile
            copy = _copy(path)
            message = "%s was written by an older MLflow; it is copied to %s, then MLflow %s migrates it"
            logger.warning(message, path, copy, mlflow.__version__)
            upgrade.main([f"{PREFIX}{path}"], standalone_mode=False)
        lock.unlink(missing_ok=True)


def _copy(path: Path) -> Path:
    names = (f"{path.name}.before-{mlflow.__version__}{f'.{i}' if i else ''}" for i in count())
    copy = next(found for name in names if not (found := path.with_name(name)).exists())
    partial = copy.with_name(copy.name + ".partial")
    partial.unlink(missing_ok=True)
    with closing(_connect(path)) as source, closing(sqlite3.connect(partial)) as target:
        source.backup(target)  # unlike a copy of the file, complete also while another process writes to it
    return partial.replace(copy)


def _connect(path: Path) -> sqlite3.Connection:
    # rw: does not create the file, but rolls back a transaction whose process was killed, which ro cannot.
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS)
