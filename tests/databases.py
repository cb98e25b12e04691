"""Starts a temporary PostgreSQL server for tests."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from lmu_dist.launch.local_commands import free_port


def tools() -> Path | None:
    """The folder with initdb; None if PostgreSQL is not installed (apt-get install postgresql)."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return found[-1].parent if found else None


def missing() -> str:
    """How to install PostgreSQL; "" if it is installed."""
    return "" if tools() else "PostgreSQL is not installed; apt-get install postgresql"


@contextmanager
def postgresql(address: str = "127.0.0.1", clients: str = "127.0.0.1/32") -> Iterator[dict[str, str]]:
    """Starts a PostgreSQL server with a password, for the clients of a network. Yields libpq's environment variables for it."""
    bin_folder = tools()
    assert bin_folder is not None
    folder = Path(mkdtemp())  # the user nobody cannot read pytest's folders
    user: dict[str, str] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    password = folder / "password"
    password.write_text("p@ss/word:1")  # characters that need quoting in a URI
    password.chmod(0o644)
    port = str(free_port())
    begin = [bin_folder / "initdb", "-D", folder / "data", "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={password}"]
    options = f"-p {port} -k {folder} -c listen_addresses={address}"
    try:
        subprocess.run(begin, check=True, capture_output=True, cwd=folder, **user)
        with (folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {clients} scram-sha-256\n")
        subprocess.run(
            [bin_folder / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start"],
            check=True, capture_output=True, cwd=folder, **user,
        )  # fmt: skip
        yield {
            "PGHOST": address,
            "PGPORT": port,
            "PGUSER": "mlflow",
            "PGDATABASE": "postgres",
            "PGPASSWORD_FILE": str(password),
        }
    finally:
        subprocess.run(
            [bin_folder / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"], check=False, cwd=folder, **user
        )
        shutil.rmtree(folder)
