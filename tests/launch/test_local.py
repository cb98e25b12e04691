"""A local cluster is started, runs a submitted job and is stopped; only its own processes are ever stopped."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from commands import run_commands

from lmu_dist.cli import main
from lmu_dist.config import ConfigError, FailedError, parse
from lmu_dist.launch import local, local_commands, processes, submission
from lmu_dist.launch.cluster import check_before_start
from lmu_dist.launch.local_commands import LocalClusterSettings
from lmu_dist.tracking.runs import records_of
from lmu_dist.tracking.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT, LMU_DIST = Path(__file__).parents[2], Path(sys.executable).parent / "lmu-dist"
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


def settings(**changed: object) -> LocalClusterSettings:
    ports = (local_commands.free_port() for _ in range(3))
    tree = {"nodes": 2, "cpus": 1, "host": "127.0.0.1", "port": next(ports), "dashboard_port": next(ports)}
    return LocalClusterSettings(**(tree | {"mlflow_port": next(ports)} | changed))


def start_sleeper(folder: Path, name: str) -> psutil.Process:
    """Starts a process with a child and a pid file."""
    processes.start(folder, name, SLEEP, os.environ)
    process = psutil.Process(processes.pid_of(folder, name))
    deadline = time.monotonic() + 20
    while not process.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_stop_ends_the_children_too(tmp_path: Path):
    leader = start_sleeper(tmp_path, "node-1")
    [child] = leader.children()
    processes.stop(tmp_path, "node-1")
    assert has_ended(leader)
    assert has_ended(child)
    assert processes.pid_of(tmp_path, "node-1") is None
    processes.stop(tmp_path, "node-1")  # a second call does nothing


def test_stop_ends_the_orphans_of_a_killed_process(tmp_path: Path):
    leader = start_sleeper(tmp_path, "node-1")
    [child] = leader.children()
    leader.kill()
    leader.wait()
    assert processes.pid_of(tmp_path, "node-1") is None
    assert not has_ended(child)
    processes.stop(tmp_path, "node-1")
    assert has_ended(child)


def test_stop_never_ends_another_process_with_the_same_pid(tmp_path: Path):
    ours, other = start_sleeper(tmp_path / "a", "node-1"), start_sleeper(tmp_path / "b", "node-1")
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        for pid in (stranger.pid, other.pid, os.getpid()):  # a stale pid file
            (tmp_path / "a" / "node-2.pid").write_text(f"{pid}\n")
            assert processes.pid_of(tmp_path / "a", "node-2") is None
            processes.stop(tmp_path / "a", "node-2")
        processes.stop(tmp_path / "a", "node-1")
        assert has_ended(ours)
        assert stranger.poll() is None
        assert not has_ended(other)
    finally:
        for child in psutil.Process(stranger.pid).children():
            child.kill()
        stranger.kill()
        stranger.wait()
        processes.stop(tmp_path / "b", "node-1", grace_seconds=0)
    assert has_ended(other)


def test_open_host_needs_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in (*local_commands.SECRETS, *local_commands.LOGIN):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"--host 0\.0\.0\.0 makes MLflow reachable from other machines, so it needs a password"
    ):
        local.up(tmp_path / "cluster", settings(host="0.0.0.0"))
    for name in local_commands.SECRETS:
        monkeypatch.setenv(name, "secret")
    with pytest.raises(ConfigError, match=r"set .*MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD .*or leave --host out"):
        local.up(tmp_path / "cluster", settings(host="0.0.0.0"))  # without a login for jobs
    with pytest.raises(ConfigError, match="--host laptop is not an IPv4 address"):
        local.up(tmp_path / "cluster", settings(host="laptop"))
    assert not (tmp_path / "cluster").exists()


def test_only_mlflow_gets_the_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    wide, login = settings(host="0.0.0.0"), dict.fromkeys(local_commands.LOGIN, "login")
    ours = dict.fromkeys(local_commands.SECRETS, "secret") | {"RAY_AUTH_TOKEN": "secret", "HOME": "/"} | login
    environment = local_commands.mlflow_environment(wide, ours, tmp_path)
    assert environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == "secret"
    assert "secret" not in json.dumps([local_commands.mlflow_command(wide, tmp_path), local_commands.basic_auth(tmp_path)])
    assert "--app-name=basic-auth" in local_commands.mlflow_command(wide, tmp_path)
    assert not login.items() & environment.items()
    ray_environment = local_commands.ray_environment(ours, tmp_path / "token", wide.mlflow)
    assert "secret" not in json.dumps(ray_environment)
    assert ray_environment.items() >= login.items()  # for the jobs


def fail_to_start(folder: Path, cluster_settings: LocalClusterSettings) -> None:
    """Runs `up` with a head that exits at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_commands, "mlflow_command", lambda *_: SLEEP)
        patch.setattr(local_commands, "ray_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such thing')"])
        patch.setattr(local, "UP_SECONDS", 10.0)
        with pytest.raises(FailedError, match="head exited: no such thing"):
            local.up(folder, cluster_settings)


def test_up_ends_as_soon_as_the_head_has_exited_under_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Ray's head does if one of its servers finds its port taken, some seconds after the head has answered."""

    def ray_command(settings: LocalClusterSettings, name: str, scratch: Path) -> list[str]:
        head = f"until test -e {tmp_path}/node; do sleep 0.1; done; echo RuntimeError: port taken; echo The rest is killed."
        return ["sh", "-c", head if name == "head" else f"touch {tmp_path}/node; sleep 600"]

    monkeypatch.setattr(local_commands, "mlflow_command", lambda *_: SLEEP)
    monkeypatch.setattr(local_commands, "ray_command", ray_command)
    monkeypatch.setattr(local, "_living_nodes", lambda *_: {local_commands.ip_of("head")})
    with pytest.raises(FailedError, match=r"^head exited: RuntimeError: port taken \(the full log is .*/head\.log\)$"):
        local.up(tmp_path, settings())
    assert [process.state for process in local.status(tmp_path)] == ["dead"] * 4


def test_a_node_that_did_not_start_is_started_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a busy machine, on which Ray's 30 seconds were too few."""

    def ray_command(settings: LocalClusterSettings, name: str, scratch: Path) -> list[str]:
        first, second = (tmp_path / f"{name}.{start}" for start in ("first", "second"))
        return ["sh", "-c", f"if test -e {first}; then touch {second}; sleep 600; else touch {first}; exit 1; fi"]

    monkeypatch.setattr(local_commands, "mlflow_command", lambda *_: SLEEP)
    monkeypatch.setattr(local_commands, "ray_command", ray_command)
    monkeypatch.setattr(local, "_get", lambda *_: b"")  # MLflow answers
    monkeypatch.setattr(local, "_living_nodes", lambda *_: {local_commands.ip_of(p.stem) for p in tmp_path.glob("*.second")})
    said = []
    try:
        assert [process.state for process in local.up(tmp_path, settings(), said.append)] == ["alive"] * 4
    finally:
        local.down(tmp_path)
    again = [line.partition(":")[0] for line in said if "again" in line]
    assert again == [f"starting {name} again" for name in ("head", "node-1", "node-2")]


def test_free_ports_are_free_and_not_those_that_linux_gives_to_connections(monkeypatch: pytest.MonkeyPatch):
    ports = [local_commands.free_port() for _ in range(20)]
    assert all(20_000 <= port < 30_000 for port in ports)  # connections have 32,768 to 60,999
    assert len(set(ports)) > 1
    monkeypatch.setattr(local_commands, "FREE_PORTS", range(ports[0], ports[0] + 1))
    in_use = rf"the ports from {ports[0]} to {ports[0]} are in use"
    with local_commands.socket.create_server(("127.0.0.1", ports[0])), pytest.raises(FailedError, match=in_use):
        local_commands.free_port()
    assert local_commands.free_port() == ports[0]


def test_down_after_a_failed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cluster_settings = settings()
    (tmp_path / "settings.json").write_text(json.dumps(asdict(cluster_settings)))
    assert local.down(tmp_path) == []
    assert main(["cluster", "down", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_truncated_files_are_reported_or_replaced(tmp_path: Path):
    for text in ("", '{"nodes": 2, "cp', '{"nodes": 2}', '{"knots": 2}', "[2]"):
        (tmp_path / "settings.json").write_text(text)
        for function in (local.status, local.down, local.exports):
            with pytest.raises(
                ConfigError, match=r"settings\.json is truncated or from another version; run lmu-dist cluster up"
            ):
                function(tmp_path)
    (tmp_path / "token").touch(0o644)
    cluster_settings = settings()
    fail_to_start(tmp_path, cluster_settings)
    assert [process.state for process in local.status(tmp_path)] == ["dead"] * 4
    token = (tmp_path / "token").read_text()
    assert len(token) == 64
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    fail_to_start(tmp_path, cluster_settings)
    assert (tmp_path / "token").read_text() == token


def test_submitted_package_does_not_contain_the_token(tmp_path: Path):
    (tmp_path / "job.yaml").touch()
    fail_to_start(tmp_path / ".cluster", settings())
    assert (tmp_path / ".cluster" / "token").is_file()
    assert set(submission._list_package(tmp_path, tmp_path / "runs").files) == {"job.yaml"}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"data": null}', b'{"data": {"result": {"result": ["x"]}}}'])
def test_other_servers_have_no_living_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes):
    (tmp_path / "token").write_text("token")
    monkeypatch.setattr(local, "_get", lambda *_: body)
    assert local._living_nodes(settings(), tmp_path / "token") == set()


def test_port_in_use_is_reported(tmp_path: Path):
    cluster_settings = settings()
    with local_commands.socket.socket() as taken:
        taken.bind(("127.0.0.1", cluster_settings.mlflow_port))
        taken.listen()
        with pytest.raises(
            ConfigError, match=rf"127\.0\.0\.1:{cluster_settings.mlflow_port} .*another port with --mlflow-port"
        ):
            local.up(tmp_path, cluster_settings)
    with pytest.raises(ConfigError, match="there is no cluster in"):
        local.status(tmp_path)


@pytest.mark.timeout(400)
def test_cluster_starts_runs_a_job_with_the_submitted_code_and_stops(
    tmp_path: Path, folder: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the job's code is that which was sent
    before = set(psutil.Process().children(recursive=True))  # processes of other tests
    cluster, cluster_settings = tmp_path / "cluster", settings()
    ports = [
        f"--port={cluster_settings.port}",
        f"--dashboard-port={cluster_settings.dashboard_port}",
        f"--mlflow-port={cluster_settings.mlflow_port}",
    ]
    command = ["cluster", "up", "--folder", str(cluster), *ports]
    assert main(command) == 0
    try:
        first = capfd.readouterr().out
        assert stat.S_IMODE((cluster / "token").stat().st_mode) == 0o600
        assert (cluster / "token").read_text() not in first
        assert main(command) == 0  # idempotent
        assert capfd.readouterr().out == first
        assert main([*command, "--nodes", "3"]) == 2
        assert "runs with other settings (nodes is 2)" in capfd.readouterr().err
        use = f"eval '{first}'; exec {sys.executable} -c '{SPREAD}'"
        seen = subprocess.run(["bash", "-c", use], capture_output=True, text=True, timeout=150, check=True).stdout
        assert seen.split() == ["127.0.0.3", "127.0.0.4"]
        with pytest.raises(ConfigError, match="Authentication token is missing or incorrect; start it, or"):
            check_before_start([parse({"cluster": {"address": f"127.0.0.2:{cluster_settings.port}"}})])  # the tests' own token
        token = {"RAY_AUTH_TOKEN": (cluster / "token").read_text()}
        run_a_job(folder, local.exports(cluster) | token, cluster_settings.dashboard)
        refuse_other_tokens(folder, cluster_settings.dashboard)
        [record] = records_of(Store(cluster_settings.mlflow), "tests").values()
        assert (record.family, record.status) == ("gated_linear_attention", "complete")
        processes.stop(cluster, "node-2", grace_seconds=0)
        assert main(["cluster", "status", "--folder", str(cluster)]) == 1
        assert "# node-2    dead" in capfd.readouterr().out
    finally:
        processes_of_cluster = set(psutil.Process().children(recursive=True)) - before
        scratch = (cluster / "ray").readlink()
        assert main(["cluster", "down", "--folder", str(cluster)]) == 0
    assert all(has_ended(process) for process in processes_of_cluster)
    assert {path.name for path in cluster.iterdir()} >= {"token", "mlflow.db", "head.log"}
    assert not list(cluster.glob("*.pid"))
    assert not (cluster / "ray").is_symlink()
    assert not scratch.exists()


def run_a_job(folder: Path, environment: dict[str, str], dashboard: str) -> None:
    """Submits a job of a user's family twice: the code that was sent trains it, once."""
    shutil.copytree(ROOT / "lmu_dist", folder / "lmu_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "lmu_dist" / "__init__.py", "a") as file:
        file.write('print("the code that was sent")\n')
    shutil.copytree(ROOT / "examples", folder / "families")
    submit = "submit job.yaml model.family=families/gated_linear_attention.py:GatedLinearAttention"
    _, shown, jobs = run_commands(
        folder, environment, f"{submit} --address {dashboard}", f"{submit} --follow", "jobs list --json"
    )
    assert "not submitted again" in shown
    assert "the code that was sent" in shown
    assert "complete    gated_linear_attention-3k-25.6k-s0-" in shown
    [row] = json.loads(jobs)
    assert (row["status"], row["experiment"]) == ("SUCCEEDED", "tests")


def refuse_other_tokens(folder: Path, dashboard: str) -> None:
    """The commands for jobs say in one line what is wrong with a token."""
    for token, answer in (("f" * 64, "refuses the token"), ("", "there is no token")):
        refused = subprocess.run(
            [LMU_DIST, "jobs", "list", "--address", dashboard],
            env=os.environ | {"RAY_AUTH_TOKEN": token, "HOME": str(folder)},
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert answer in refused.stderr
        assert "RAY_AUTH_TOKEN" in refused.stderr
