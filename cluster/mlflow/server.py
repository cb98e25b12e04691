"""Starts MLflow's tracking server on PostgreSQL, always with password authentication.

Run it by hand, by compose.yaml in this folder or by cluster/kuberay, with the options of `mlflow server`:
    python cluster/mlflow/server.py --port 5000 --artifacts-destination s3://bucket/mlflow
It listens on loopback unless --host is given. Invalid input: one line that names the fix, exit code 2, nothing is started.

PGHOST, PGPORT, PGDATABASE, PGUSER name the database. Secrets come from environment variables, or from files named by NAME_FILE.
They never come from the command line, which every user of a machine can read:
    MLFLOW_AUTH_ADMIN_PASSWORD       password that the user `admin` gets when the database is new
    MLFLOW_FLASK_SERVER_SECRET_KEY   random key of the session cookies
    PGPASSWORD                       password of the database (libpq's PGPASSFILE works too)
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REQUIRED = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
RESERVED = ("--backend-store-uri", "--registry-store-uri", "--read-replica-backend-store-uri", "--app-name")


def prepare(options: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server. Raises ValueError; its message names the fix."""
    if given := [name for name in RESERVED if any(option.split("=")[0] == name for option in options)]:
        raise ValueError(f"remove {given[0]}; the PG* variables name the database, and basic auth is always on")
    environment = dict(environment)
    for name in (*REQUIRED, "PGPASSWORD"):
        if path := environment.pop(f"{name}_FILE", None):
            try:
                environment[name] = Path(path).read_text(encoding="utf-8").strip()
            except OSError as e:
                raise ValueError(f"cannot read {path}: {e.strerror}; set {name}_FILE to a file that holds the secret") from e
    for name in REQUIRED:
        if not environment.get(name):
            raise ValueError(f"set {name}, or {name}_FILE to a file that holds it; the server needs authentication to start")
    environment |= {
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://",  # PG* variables give the rest, so no process list shows a password
        "MLFLOW_AUTH_CONFIG_PATH": str(Path(__file__).with_name("auth.ini")),
    }
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # MLflow's own background jobs; not used
    # If an option is given twice the last one wins, so these are defaults.
    return [sys.executable, "-m", "mlflow", "server", "--app-name=basic-auth", "--host=127.0.0.1", *options], environment


if __name__ == "__main__":
    try:
        command, environment = prepare(sys.argv[1:], os.environ)
    except ValueError as e:
        print(f"server.py: {e}", file=sys.stderr)
        sys.exit(2)
    os.execve(command[0], command, environment)
