"""MLflow's tracking server on PostgreSQL, always behind passwords: the environment in, the running server out.

Run by hand, by compose.yaml beside it and by cluster/kuberay, with the options of `mlflow server`:
    python cluster/mlflow/server.py --port 5000 --artifacts-destination s3://bucket/mlflow
Listens on loopback unless --host says otherwise. Bad input: one line that names the fix, exit 2, nothing was started.

PGHOST, PGPORT, PGDATABASE, PGUSER name the database. Secrets come from variables or, by NAME_FILE, from files, and never from
the command line, which everyone on a machine can read: MLFLOW_AUTH_ADMIN_PASSWORD, which the user `admin` gets when the
database is new; MLFLOW_FLASK_SERVER_SECRET_KEY, random; PGPASSWORD, the database's (libpq's own PGPASSFILE will do too).
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

NEEDED = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
OURS = ("--backend-store-uri", "--registry-store-uri", "--read-replica-backend-store-uri", "--app-name")


def prepare(options: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command of the server and its environment. Raises ValueError with the fix."""
    if given := [name for name in OURS if any(option.split("=")[0] == name for option in options)]:
        raise ValueError(f"leave {given[0]} out; the PG* variables name the database, and basic auth is always on")
    environment = dict(environment)
    for name in (*NEEDED, "PGPASSWORD"):
        if path := environment.pop(f"{name}_FILE", None):
            try:
                environment[name] = Path(path).read_text(encoding="utf-8").strip()
            except OSError as e:
                raise ValueError(f"cannot read {path}: {e.strerror}; make {name}_FILE a file that holds the secret") from e
    for name in NEEDED:
        if not environment.get(name):
            raise ValueError(f"set {name}, or {name}_FILE to a file that holds it: nothing is served without authentication")
    environment |= {
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://",  # the rest is said by PG*, so no process list shows a password
        "MLFLOW_AUTH_CONFIG_PATH": str(Path(__file__).with_name("auth.ini")),
    }
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # jobs of MLflow's own, which nobody here asks for
    # Of an option given twice the last counts, so these are defaults.
    return [sys.executable, "-m", "mlflow", "server", "--app-name=basic-auth", "--host=127.0.0.1", *options], environment


if __name__ == "__main__":
    try:
        command, environment = prepare(sys.argv[1:], os.environ)
    except ValueError as e:
        print(f"server.py: {e}", file=sys.stderr)
        sys.exit(2)
    os.execve(command[0], command, environment)
