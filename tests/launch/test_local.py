"""A local cluster: really started, used, and ended; and by its pid files alone, what it never ends."""

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from lmu_dist.cli import main
from lmu_dist.config import ConfigError, FailedError, parse
from lmu_dist.launch import local, parts, processes, submission
from lmu_dist.launch.cluster import check_before
from lmu_dist.launch.parts import Settings

pytestmark = pytest.mark.filterwarnings("ignore")
SLEEP = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"]

SPREAD = """
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init(log_to_driver=False)
group = placement_group([{"CPU": 1}, {"CPU": 1}], "STRICT_SPREAD")
here = ray.remote(num_cpus=1)(lambda: ray.util.get_node_ip_address())
at = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(2)]
print(*sorted(ray.get([here.options(scheduling_strategy=s).remote() for s in at])))
"""


def settings(**changed: object) -> Settings:
    ports = (_free_port() for _ in range(3))
    tree = {"nodes": 2, "cpus": 1, "host": "127.0.0.1", "port": next(ports), "dashboard_port": next(ports)}
    return Settings(**(tree | {"mlflow_port": next(ports)} | changed))


def _free_port() -> int:
    return parts._listen("127.0.0.1", 0)


def started(folder: Path, name: str) -> psutil.Process:
    """A process with a child, and its pid file."""
    processes.start(folder, name, SLEEP, os.environ)
    process = psutil.Process(processes.pid_of(folder, name))
    deadline = time.monotonic() + 20
    while not process.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_what_a_part_started_ends_with_it(tmp_path: Path):
    leader = started(tmp_path, "node-1")
    [child] = leader.children()
    processes.stop(tmp_path, "node-1")
    assert is_gone(leader)
    assert is_gone(child)
    assert processes.pid_of(tmp_path, "node-1") is None
    processes.stop(tmp_path, "node-1")  # again: nothing to do


def test_what_a_killed_part_left_behind_ends_too(tmp_path: Path):
    leader = started(tmp_path, "node-1")
    [child] = leader.children()
    leader.kill()
    leader.wait()
    assert processes.pid_of(tmp_path, "node-1") is None
    assert not is_gone(child)
    processes.stop(tmp_path, "node-1")
    assert is_gone(child)


def test_a_stranger_under_the_same_pid_is_left_alone(tmp_path: Path):
    ours, other = started(tmp_path / "a", "node-1"), started(tmp_path / "b", "node-1")
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        for pid in (stranger.pid, other.pid, os.getpid()):  # the pid file of a process that is long gone
            (tmp_path / "a" / "node-2.pid").write_text(f"{pid}\n")
            assert processes.pid_of(tmp_path / "a", "node-2") is None
            processes.stop(tmp_path / "a", "node-2")
        processes.stop(tmp_path / "a", "node-1")
        assert is_gone(ours)
        assert stranger.poll() is None
        assert not is_gone(other)
    finally:
        for child in psutil.Process(stranger.pid).children():
            child.kill()
        stranger.kill()
        stranger.wait()
        processes.stop(tmp_path / "b", "node-1", grace_seconds=0)
    assert is_gone(other)


def test_nothing_listens_wider_without_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in (*parts.SECRETS, *parts.LOGIN):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 opens MLflow to others, so it must ask for a password"):
        local.up(tmp_path / "cluster", settings(host="0.0.0.0"))
    for name in parts.SECRETS:
        monkeypatch.setenv(name, "secret")
    with pytest.raises(ConfigError, match=r"set .*MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD .*or leave --host out"):
        local.up(tmp_path / "cluster", settings(host="0.0.0.0"))  # where every job would be refused
    with pytest.raises(ConfigError, match="--host laptop is no IPv4 address"):
        local.up(tmp_path / "cluster", settings(host="laptop"))
    assert not (tmp_path / "cluster").exists()


def test_a_password_stays_with_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    wide, login = settings(host="0.0.0.0"), dict.fromkeys(parts.LOGIN, "login")
    ours = dict.fromkeys(parts.SECRETS, "secret") | {"RAY_AUTH_TOKEN": "secret", "HOME": "/"} | login
    environment = parts.mlflow_environment(wide, ours, tmp_path)
    assert environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == "secret"
    assert "secret" not in json.dumps([parts.mlflow_command(wide, tmp_path), parts.basic_auth(tmp_path)])
    assert "--app-name=basic-auth" in parts.mlflow_command(wide, tmp_path)
    assert not login.items() & environment.items()
    of_ray = parts.ray_environment(ours, tmp_path / "token", wide.mlflow)
    assert "secret" not in json.dumps(of_ray)
    assert of_ray.items() >= login.items()  # of the jobs, which have no other


def fail_to_start(folder: Path, wanted: Settings) -> None:
    """Everything up to the head, which ends at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "mlflow_command", lambda *_: SLEEP)
        patch.setattr(parts, "ray_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such thing')"])
        patch.setattr(local, "UP_SECONDS", 10.0)
        with pytest.raises(FailedError, match="head ended at once: no such thing"):
            local.up(folder, wanted)


def test_an_up_that_failed_can_be_taken_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wanted = settings()
    (tmp_path / "settings.json").write_text(json.dumps(asdict(wanted)))
    assert local.down(tmp_path) == []
    assert main(["cluster", "down", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_files_cut_short_are_one_line_or_made_anew(tmp_path: Path):
    for text in ("", '{"nodes": 2, "cp', '{"nodes": 2}', '{"knots": 2}', "[2]"):
        (tmp_path / "settings.json").write_text(text)
        for ask in (local.status, local.down, local.exports):
            with pytest.raises(ConfigError, match=r"settings\.json is cut short or of another version; lmu-dist cluster up"):
                ask(tmp_path)
    (tmp_path / "token").touch(0o644)
    wanted = settings()
    fail_to_start(tmp_path, wanted)
    assert [part.state for part in local.status(tmp_path)] == ["dead"] * 4
    token = (tmp_path / "token").read_text()
    assert len(token) == 64
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    fail_to_start(tmp_path, wanted)
    assert (tmp_path / "token").read_text() == token


def test_no_job_brings_the_token_along(tmp_path: Path):
    (tmp_path / "job.yaml").touch()
    fail_to_start(tmp_path / ".cluster", settings())
    assert (tmp_path / ".cluster" / "token").is_file()
    assert set(submission._pack(tmp_path).files) == {"job.yaml"}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"data": null}', b'{"data": {"result": {"result": ["x"]}}}'])
def test_who_answers_but_is_not_ray_has_no_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes):
    (tmp_path / "token").write_text("token")
    monkeypatch.setattr(local, "_answer", lambda *_: body)
    assert local._living_nodes(settings(), tmp_path / "token") == set()


def test_a_port_that_is_taken_is_named(tmp_path: Path):
    wanted = settings()
    with parts.socket.socket() as taken:
        taken.bind(("127.0.0.1", wanted.mlflow_port))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{wanted.mlflow_port} .*another port with --mlflow-port"):
            local.up(tmp_path, wanted)
    with pytest.raises(ConfigError, match="there is no cluster in"):
        local.status(tmp_path)


@pytest.mark.timeout(400)
def test_a_cluster_comes_up_is_used_and_goes_down(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    before = set(psutil.Process().children(recursive=True))  # of other tests
    folder, wanted = tmp_path / "cluster", settings()
    ports = [f"--port={wanted.port}", f"--dashboard-port={wanted.dashboard_port}", f"--mlflow-port={wanted.mlflow_port}"]
    command = ["cluster", "up", "--folder", str(folder), *ports]
    assert main(command) == 0
    try:
        first = capfd.readouterr().out
        assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
        assert (folder / "token").read_text() not in first
        assert main(command) == 0  # idempotent: the same processes
        assert capfd.readouterr().out == first
        assert main([*command, "--nodes", "3"]) == 2
        assert "runs with other settings (nodes is 2)" in capfd.readouterr().err
        use = f"eval '{first}'; exec {sys.executable} -c '{SPREAD}'"
        seen = subprocess.run(["bash", "-c", use], capture_output=True, text=True, timeout=150, check=True).stdout
        assert seen.split() == ["127.0.0.3", "127.0.0.4"]
        with pytest.raises(ConfigError, match="Authentication token is missing or incorrect; start it, or"):
            check_before([parse({"cluster": {"address": f"127.0.0.2:{wanted.port}"}})])  # the tests' own token
        processes.stop(folder, "node-2", grace_seconds=0)
        assert main(["cluster", "status", "--folder", str(folder)]) == 1
        assert "# node-2    dead" in capfd.readouterr().out
    finally:
        everything = set(psutil.Process().children(recursive=True)) - before
        scratch = (folder / "ray").readlink()
        assert main(["cluster", "down", "--folder", str(folder)]) == 0
    assert all(is_gone(process) for process in everything)
    assert {path.name for path in folder.iterdir()} >= {"token", "mlflow.db", "head.log"}
    assert not list(folder.glob("*.pid"))
    assert not (folder / "ray").is_symlink()
    assert not scratch.exists()
