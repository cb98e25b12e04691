"""Submits a ladder to a cluster in network namespaces and breaks something in each scenario. The results must not change.

    python tests/netns.py [--whole] [--postgres] [SCENARIO ...]       as root; all scenarios take about ten minutes on two cores

The head (no CPUs), the nodes (1 CPU each, a worker on each by STRICT_SPREAD) and MLflow have their own addresses on a bridge.
The root namespace reaches them through it, like a machine outside the cluster. Prints one line per scenario. Exits with 1 if
one failed, with 3 if this machine lacks a requirement. Removes everything it creates. Called by test_netns.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import databases  # noqa: E402
from conftest import write_corpus  # noqa: E402
from filelock import FileLock  # noqa: E402

from lmu_dist.config import ConfigError, FailedError  # noqa: E402
from lmu_dist.launch import processes  # noqa: E402
from lmu_dist.launch.local_commands import ray_environment, ray_start  # noqa: E402
from lmu_dist.tracking.runs import records_of  # noqa: E402
from lmu_dist.tracking.store import Store  # noqa: E402

BRIDGE, NET = "lmu-bridge", "10.213.0"
HOSTS = {"head": 1, "mlflow": 2, "node-1": 11, "node-2": 12, "node-3": 13}  # last number of the address
DASHBOARD, MLFLOW = f"http://{NET}.{HOSTS['head']}:8265", f"http://{NET}.{HOSTS['mlflow']}:5000"
CUT_SECONDS = 30.0
SMALL = (
    "data.tokenizer.vocab_tokens=400 train.sequence_tokens=32 train.batch_tokens=256 train.warmup_tokens=2560 "
    "train.eval_every_tokens=64_000 train.eval_tokens=2048 ladder.families=[lmu,transformer] ladder.n_params=[3000] "
    "ladder.seeds=[0] ladder.tokens=[64_000,256_000] cluster.checkpoint_every_steps=100"
)
Table = dict[tuple[str, int, int, int], tuple[str, int, float]]  # family, N, planned tokens, seed: status, tokens, nats


class BrokenError(Exception):
    """A scenario failed."""


class NamespaceCluster:
    """A context with network namespaces, a cluster in them, and a shared storage. Removes all of it at the end."""

    def __init__(self, whole: bool, postgres: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lmu-netns-"))
        # The relative storage is below the token's folder.
        self.overrides = ["cluster.n_workers=2", "cluster.placement=STRICT_SPREAD"]
        if not whole:
            write_corpus(self.folder / "corpus")
            self.overrides += ["data.source=files", f"data.files=[{self.folder}/corpus/*.jsonl]", *SMALL.split()]
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.environment = ray_environment(os.environ, self.folder / "token", MLFLOW, interface="eth0")
        self.environment["DS_ACCELERATOR"] = "cpu"
        self.cleanup, self.postgres = ExitStack(), postgres
        if postgres:  # passwords are in the environment of the nodes, like Kubernetes Secrets
            password = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16)}
            self.environment |= password
            os.environ |= password
        self.drivers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "NamespaceCluster":
        try:
            remove_namespaces()
            ip(f"link add {BRIDGE} type bridge")
            ip(f"addr add {NET}.254/24 dev {BRIDGE}")
            ip(f"link set {BRIDGE} up")
            self.start_mlflow()
            self.start_head()
            self.start_node("node-1")
            self.start_node("node-2")
            wait(lambda: http_get(f"{MLFLOW}/health"), 120, "MLflow answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        for name in HOSTS:
            self.kill(name)
        self.cleanup.close()
        remove_namespaces()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_mlflow(self) -> None:
        """Starts an MLflow server: the plain one on SQLite, or the one of cluster/mlflow on PostgreSQL, with passwords."""
        listen = ["--workers=1", "--port=5000", f"--host={NET}.{HOSTS['mlflow']}"]
        listen += [f"--allowed-hosts={MLFLOW.removeprefix('http://')}", f"--artifacts-destination={self.folder}/artifacts"]
        if not self.postgres:
            self.start(
                "mlflow", [sys.executable, "-m", "mlflow", "server", f"--backend-store-uri=sqlite:///{self.folder}/db", *listen]
            )
            return
        database = self.cleanup.enter_context(databases.postgresql(f"{NET}.254", f"{NET}.0/24"))
        admin = {"MLFLOW_AUTH_ADMIN_PASSWORD": self.environment["MLFLOW_TRACKING_PASSWORD"]}
        keys = {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
        self.start("mlflow", [sys.executable, str(ROOT / "cluster/mlflow/server.py"), *listen], database | admin | keys)

    def start(self, name: str, command: Sequence[str], more: Mapping[str, str] = MappingProxyType({})) -> None:
        """Runs a command in a namespace, which is created if needed."""
        if not Path(f"/run/netns/lmu-{name}").exists():
            ip(f"netns add lmu-{name}")
            ip(f"link add lmu-{name} type veth peer name eth0 netns lmu-{name}")
            ip(f"link set lmu-{name} master {BRIDGE} up")
            ip(f"-n lmu-{name} addr add {NET}.{HOSTS[name]}/24 dev eth0")
            ip(f"-n lmu-{name} link set eth0 up")
            ip(f"-n lmu-{name} link set lo up")
        processes.start(self.folder, name, ["ip", "netns", "exec", f"lmu-{name}", *command], self.environment | more)

    def start_head(self) -> None:
        """Starts the Ray head, and waits until it answers."""
        options = {"--port": 6379, "--dashboard-host": f"{NET}.1", "--dashboard-port": 8265, "--temp-dir": self.folder / "head"}
        self.start("head", [*ray_start(f"{NET}.1", 0, options), "--head"])
        wait(lambda: self.n_live_nodes() == 1, 120, "the head answers")

    def start_node(self, name: str) -> None:
        """Starts a Ray node with one CPU, and waits until it has joined."""
        before = self.n_live_nodes()
        options = {"--address": f"{NET}.1:6379", "--temp-dir": self.folder / name}
        self.start(name, ray_start(f"{NET}.{HOSTS[name]}", 1, options))
        wait(lambda: self.n_live_nodes() > before, 120, f"{name} has joined")

    def n_live_nodes(self) -> int:
        """The number of live nodes, as Ray reports it."""
        token = (self.folder / "token").read_text()
        return http_get(f"{DASHBOARD}/api/v0/nodes", token).count(b'"ALIVE"')

    def kill(self, name: str) -> None:
        """Kills all processes of a namespace at once."""
        processes.stop(self.folder, name, grace_seconds=0)

    def submit(self, **environment: str) -> subprocess.Popen[str]:
        """Submits the ladder from the root namespace and follows its log."""
        command = [sys.executable, "-m", "lmu_dist.cli", "submit", "jobs/quickstart.yaml", *self.overrides]
        command += ["--address", DASHBOARD, "--follow"]
        with open(self.folder / "submit.log", "a") as log:
            environment = self.environment | environment
            driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        self.drivers.append(driver)
        return driver

    def finish(self, driver: subprocess.Popen[str], seconds: float) -> tuple[Table, int]:
        """Waits for the submission. Returns the results in MLflow and the total number of attempts. Raises BrokenError."""
        try:
            code = driver.wait(seconds)
        except subprocess.TimeoutExpired as e:
            raise BrokenError(f"the submission did not end within {seconds:.0f} s: {self.log_tail()}") from e
        if code:
            raise BrokenError(f"exit {code}: {self.log_tail()}")
        store = Store(MLFLOW)
        found = records_of(store, "quickstart")
        report = [sys.executable, "-m", "lmu_dist.cli", "report", "quickstart", "-o", str(self.folder / "report")]
        if subprocess.run(report, env=self.environment, capture_output=True).returncode:
            raise BrokenError("the report failed")
        attempts = sum(int(store.client.get_run(run_id).data.tags["lmu.attempt"]) for run_id in found)
        return {
            (r.family, r.n_params, r.planned_tokens, r.seed): (r.status, r.tokens, r.val_loss_nats) for r in found.values()
        }, attempts

    def log_tail(self) -> str:
        """The last lines of the submission's log."""
        return "\n    ".join((self.folder / "submit.log").read_text().splitlines()[-12:])

    def wait_for_second_cell(self) -> None:
        """Waits until a cell has ended and the next cell of the same trunk has a checkpoint."""
        runs = self.folder / "runs"
        wait(lambda: list(runs.glob("*/*/record.json")), 900, "a cell has ended")
        ended = {path.parent for path in runs.glob("*/*/record.json")}
        wait(
            lambda: {path.parents[1] for path in runs.glob("*/*/step-*/meta.json")} - ended,
            900,
            "another cell has a checkpoint",
        )


def plain(cluster: NamespaceCluster) -> subprocess.Popen[str]:
    """Nothing breaks."""
    return cluster.submit()


def wrong_token(cluster: NamespaceCluster) -> subprocess.Popen[str]:
    """A wrong token is refused with one line, by the Jobs API and by Ray itself; then the right one works."""
    (cluster.folder / "wrong").write_text(secrets.token_hex(32))
    wrong = {"RAY_AUTH_TOKEN_PATH": str(cluster.folder / "wrong")}
    driver = cluster.submit(**wrong)
    if driver.wait(60) != 2 or "refuses the token" not in cluster.log_tail():
        raise BrokenError(f"submit with a wrong token: exit {driver.returncode}: {cluster.log_tail()}")
    inside = ["ip", "netns", "exec", "lmu-node-1", sys.executable, "-m", "lmu_dist.cli", "ladder", "jobs/quickstart.yaml"]
    done = subprocess.run(
        [*inside, *cluster.overrides, f"cluster.address={NET}.1:6379"],
        cwd=ROOT,
        env=cluster.environment | wrong,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 2 or "Authentication token is missing or incorrect" not in done.stderr:
        raise BrokenError(f"ladder with a wrong token: exit {done.returncode}: {done.stderr}")
    return cluster.submit()


def node_killed(cluster: NamespaceCluster) -> subprocess.Popen[str]:
    """A node is killed in the middle of a cell, and another replaces it."""
    driver = cluster.submit()
    cluster.wait_for_second_cell()
    cluster.kill("node-2")
    wait(lambda: cluster.n_live_nodes() == 2, 120, "Ray has noticed the dead node")
    cluster.start_node("node-3")
    return driver


def cut(cluster: NamespaceCluster) -> subprocess.Popen[str]:
    """The network of a node is down for CUT_SECONDS in the middle of a cell."""
    driver = cluster.submit()
    cluster.wait_for_second_cell()
    ip("link set lmu-node-2 down")
    time.sleep(CUT_SECONDS)
    ip("link set lmu-node-2 up")
    return driver


def head_restarted(cluster: NamespaceCluster) -> subprocess.Popen[str]:
    """The head and its job are killed in the middle of a cell; then the cluster is restarted and the ladder submitted again."""
    driver = cluster.submit()
    cluster.wait_for_second_cell()
    for name in ("head", "node-1", "node-2"):
        cluster.kill(name)
    cluster.start_head()
    cluster.start_node("node-1")
    cluster.start_node("node-2")
    if (code := driver.wait(120)) != 1:
        raise BrokenError(f"the lost submission ended with exit code {code}: {cluster.log_tail()}")
    return cluster.submit()


def wrong_password(cluster: NamespaceCluster) -> subprocess.Popen[str]:
    """MLflow refuses a wrong password with one line, before anything starts; also for a report. Needs --postgres."""
    wrong = {"MLFLOW_TRACKING_PASSWORD": "wrong"}
    for command in (["ladder", "jobs/quickstart.yaml", *cluster.overrides], ["report", "quickstart"]):
        done = subprocess.run(
            [sys.executable, "-m", "lmu_dist.cli", *command],
            cwd=ROOT, env=cluster.environment | wrong, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode != 2 or "refuses the user or the password" not in done.stderr.splitlines()[-1]:
            raise BrokenError(f"{command[0]} with a wrong password: exit {done.returncode}: {done.stderr}")
    if (cluster.folder / "runs").exists():
        raise BrokenError("something was started with a wrong password")
    return cluster.submit()


SCENARIOS: dict[str, Callable[[NamespaceCluster], subprocess.Popen[str]]] = {
    f.__name__.replace("_", "-"): f for f in (plain, wrong_token, wrong_password, node_killed, cut, head_restarted)
}


RESTARTING = ("node-killed", "head-restarted")  # scenarios that must cost an attempt; a short network failure may cost none


def main() -> int:
    """Runs the scenarios given, `plain` first: the results of the others must equal its results bit for bit."""
    parser = ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--whole", action="store_true", help="run all of jobs/quickstart.yaml, some minutes per scenario")
    parser.add_argument("--postgres", action="store_true", help="run MLflow on PostgreSQL, with passwords")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    asked = parser.parse_args()
    if unknown := set(asked.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if reason := missing_requirement() or (asked.postgres and databases.missing()):
        print(reason)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["RAY_AUTH_MODE"] = "token"
    if not asked.postgres:
        del SCENARIOS["wrong-password"]
    reference: Table | None = None
    failed = False
    with FileLock(Path(tempfile.gettempdir()) / "lmu-netns.lock"):
        for name in dict.fromkeys(["plain", *(asked.scenarios or SCENARIOS)]):
            began = time.monotonic()
            try:
                with NamespaceCluster(asked.whole, asked.postgres) as cluster:
                    table, attempts = cluster.finish(SCENARIOS[name](cluster), 7200 if asked.whole else 1200)
                if any(status != "complete" for status, _, _ in table.values()):
                    raise BrokenError(f"not all cells are complete: {table}")
                reference = reference or table
                if name in RESTARTING and attempts == len(table):
                    raise BrokenError("the scenario broke nothing: every cell took one attempt")
                if table != reference:
                    raise BrokenError(f"other results: {table} instead of {reference}")
                verdict = f"ok, {len(table)} cells in {attempts} attempts, losses equal"
            except (BrokenError, ConfigError, FailedError, subprocess.SubprocessError) as e:
                verdict, failed = f"FAILED: {e}", True
            print(f"{name:<16}{time.monotonic() - began:6.0f} s  {verdict}", flush=True)
            if reference is None:
                return 1
    return 1 if failed else 0


def missing_requirement() -> str | None:
    """The requirement that this machine lacks; None if it lacks none."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need ip from iproute2"
    try:
        ip(f"netns add lmu-try-{os.getpid()}")
        ip(f"netns del lmu-try-{os.getpid()}")
    except subprocess.CalledProcessError as e:
        return f"cannot create a network namespace: {e.stderr.strip()}"
    return None


def ip(arguments: str) -> None:
    """Runs `ip` with arguments. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def remove_namespaces() -> None:
    """Removes the bridge, the links and the namespaces, also those of a killed earlier run."""
    for name in HOSTS:
        # The link first: the kernel would remove it some time after its namespace.
        if Path(f"/sys/class/net/lmu-{name}").exists():
            ip(f"link del lmu-{name}")
        if Path(f"/run/netns/lmu-{name}").exists():
            ip(f"netns del lmu-{name}")
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        ip(f"link del {BRIDGE}")


def wait(condition: Callable[[], object], seconds: float, description: str) -> None:
    """Waits until a condition holds. Raises BrokenError after a timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BrokenError(f"timeout of {seconds:.0f} s: waited until {description}")
        time.sleep(0.2)


def http_get(url: str, token: str = "") -> bytes:
    """The body of an HTTP GET; empty if the request fails."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return response.read()
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
