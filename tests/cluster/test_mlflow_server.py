"""Tests of cluster/mlflow/server.py: authentication is always on, no secret on a command line; on a real PostgreSQL if any."""

import importlib.util
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import databases
import pytest

from lmu_dist.launch.local_commands import free_port

SERVER = Path(__file__).parents[2] / "cluster" / "mlflow" / "server.py"
GIVEN = {"MLFLOW_AUTH_ADMIN_PASSWORD": "correct horse", "MLFLOW_FLASK_SERVER_SECRET_KEY": "key", "PGPASSWORD": "staple"}


@pytest.fixture(scope="module")
def server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_server_listens_on_loopback_with_authentication(server: ModuleType):
    command, environment = server.prepare(["--port=5001"], GIVEN)
    assert command[3:] == ["server", "--app-name=basic-auth", "--host=127.0.0.1", "--port=5001"]
    assert environment.items() >= GIVEN.items()
    assert not any(secret in " ".join(command) + environment["MLFLOW_BACKEND_STORE_URI"] for secret in GIVEN.values())


@pytest.mark.parametrize("missing", ["MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_server_does_not_start_without_authentication(server: ModuleType, missing: str, host: str):
    with pytest.raises(ValueError, match=f"set {missing}"):
        server.prepare([f"--host={host}"], GIVEN | {missing: ""})


@pytest.mark.parametrize("option", [["--app-name", "none"], ["--backend-store-uri=postgresql://u:p@h/d"]])
def test_options_that_disable_authentication_are_rejected(server: ModuleType, option: list[str]):
    with pytest.raises(ValueError, match=f"remove {option[0].split('=')[0]}"):
        server.prepare(option, GIVEN)


def test_secrets_come_from_files(server: ModuleType, tmp_path: Path):
    for name, secret in GIVEN.items():
        (tmp_path / name).write_text(f"{secret}\n")
    files = {f"{name}_FILE": str(tmp_path / name) for name in GIVEN}
    assert server.prepare([], files)[1].items() >= GIVEN.items()
    with pytest.raises(ValueError, match="cannot read"):
        server.prepare([], files | {"PGPASSWORD_FILE": str(tmp_path / "none")})


def test_invalid_input_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, SERVER], env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def database() -> Iterator[dict[str, str]]:
    if databases.missing():
        pytest.skip(databases.missing())
    with databases.postgresql() as settings:
        yield settings


@pytest.mark.slow
def test_server_works_on_postgresql_and_rejects_wrong_passwords(
    database: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    port = free_port()
    key = tmp_path / "key"
    key.write_text(secrets.token_hex(16))
    environment = os.environ | database | GIVEN | {"MLFLOW_FLASK_SERVER_SECRET_KEY_FILE": str(key)}
    environment.pop("PGPASSWORD")
    command = [sys.executable, SERVER, f"--port={port}", "--workers=1", f"--artifacts-destination={tmp_path}/artifacts"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", GIVEN["MLFLOW_AUTH_ADMIN_PASSWORD"])
    with (tmp_path / "log").open("w") as log:
        serving = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert serving.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        client = MlflowClient(f"http://127.0.0.1:{port}")
        run = client.create_run(client.create_experiment("test")).info.run_id
        client.log_metric(run, "loss", 1.5)
        client.log_text(run, "text", "note.txt")
        assert client.get_run(run).data.metrics == {"loss": 1.5}
        assert [artifact.path for artifact in client.list_artifacts(run)] == ["note.txt"]
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with pytest.raises(MlflowException, match="401"):
            client.search_experiments()
    finally:
        serving.terminate()
        serving.wait(30)
