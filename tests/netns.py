"""A cluster of machines that are network namespaces, and what breaks in one: a ladder submitted from outside ends with the same
table after each of the scenarios.

    python tests/netns.py [--whole] [--postgres] [SCENARIO ...]       as root; all of them take some ten minutes on two cores

The head (no CPUs), the nodes (1 CPU each, a worker on each by STRICT_SPREAD) and MLflow have addresses of their own behind a
bridge, from which the root namespace, being outside, reaches them. One line per scenario; exit 1 if one failed, 3 if this
machine cannot. Everything that was made is removed. test_netns runs it.
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
from lmu_dist.launch.parts import ray_environment, ray_start  # noqa: E402
from lmu_dist.tracking.store import Store  # noqa: E402

BRIDGE, NET = "lmu-bridge", "10.213.0"
HOSTS = {"head": 1, "mlflow": 2, "node-1": 11, "node-2": 12, "node-3": 13}  # last number of the address
DASHBOARD, MLFLOW = f"http://{NET}.{HOSTS['head']}:8265", f"http://{NET}.{HOSTS['mlflow']}:5000"
CUT_SECONDS = 30.0
SMALL = (
    "data.tokenizer.vocab_tokens=400 train.sequence_tokens=32 train.batch_tokens=256 train.warmup_tokens=2560 "
    "train.eval_every_tokens=64_000 train.eval_tokens=2048 ladder.families=[lmu,transformer] ladder.n_params=[3000] "
    "ladder.tokens=[64_000,256_000] cluster.checkpoint_every_steps=100"
)
Table = dict[tuple[str, int, int, int], tuple[str, int, float]]  # family, N, planned tokens, seed: status, tokens, nats


class BrokenError(Exception):
    """A scenario did not come to the end it should."""


class World:
    """Namespaces, a cluster in them, and a storage that all see. A context: what it made is gone afterwards."""

    def __init__(self, whole: bool, postgres: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lmu-netns-"))
        self.overrides = ["cluster.placement=STRICT_SPREAD"]  # storage is relative: below the token's folder
        if not whole:
            write_corpus(self.folder / "corpus")
            self.overrides += ["data.source=files", f"data.files=[{self.folder}/corpus/*.jsonl]", *SMALL.split()]
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.environment = ray_environment(os.environ, self.folder / "token", MLFLOW, interface="eth0")
        self.environment["DS_ACCELERATOR"] = "cpu"
        self.cleanup, self.postgres = ExitStack(), postgres
        if postgres:  # passwords are in the environment of this cluster's nodes, as Secrets would be
            password = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16)}
            self.environment |= password
            os.environ |= password
        self.drivers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "World":
        try:
            sweep()
            ip(f"link add {BRIDGE} type bridge")
            ip(f"addr add {NET}.254/24 dev {BRIDGE}")
            ip(f"link set {BRIDGE} up")
            self.start_mlflow()
            self.start_head()
            self.start_node("node-1")
            self.start_node("node-2")
            wait(lambda: answers(f"{MLFLOW}/health"), 120, "MLflow answers")
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
        sweep()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_mlflow(self) -> None:
        """Starts the tracking server: MLflow's own on SQLite, or that of cluster/ on PostgreSQL, behind passwords."""
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
        """Starts a machine, unless it is there, and a command on it."""
        if not Path(f"/run/netns/lmu-{name}").exists():
            ip(f"netns add lmu-{name}")
            ip(f"link add lmu-{name} type veth peer name eth0 netns lmu-{name}")
            ip(f"link set lmu-{name} master {BRIDGE} up")
            ip(f"-n lmu-{name} addr add {NET}.{HOSTS[name]}/24 dev eth0")
            ip(f"-n lmu-{name} link set eth0 up")
            ip(f"-n lmu-{name} link set lo up")
        processes.start(self.folder, name, ["ip", "netns", "exec", f"lmu-{name}", *command], self.environment | more)

    def start_head(self) -> None:
        """Starts Ray's head, and waits until it answers to the token."""
        options = {"--port": 6379, "--dashboard-host": f"{NET}.1", "--dashboard-port": 8265, "--temp-dir": self.folder / "head"}
        self.start("head", [*ray_start(f"{NET}.1", 0, options), "--head"])
        wait(lambda: self.living() == 1, 120, "the head answers")

    def start_node(self, name: str) -> None:
        """Starts a node of one CPU, and waits until Ray counts it."""
        before = self.living()
        options = {"--address": f"{NET}.1:6379", "--temp-dir": self.folder / name}
        self.start(name, ray_start(f"{NET}.{HOSTS[name]}", 1, options))
        wait(lambda: self.living() > before, 120, f"{name} has joined")

    def living(self) -> int:
        """How many nodes Ray counts."""
        token = (self.folder / "token").read_text()
        return answers(f"{DASHBOARD}/api/v0/nodes", token).count(b'"ALIVE"')

    def kill(self, name: str) -> None:
        """Ends all processes of a machine at once."""
        processes.stop(self.folder, name, grace_seconds=0)

    def submit(self, **environment: str) -> subprocess.Popen[str]:
        """Submits the ladder from outside, and follows it."""
        command = [sys.executable, "-m", "lmu_dist.cli", "submit", "jobs/quickstart.yaml", *self.overrides]
        command += ["--address", DASHBOARD, "--follow"]
        with open(self.folder / "submit.log", "a") as log:
            environment = self.environment | environment
            driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        self.drivers.append(driver)
        return driver

    def finish(self, driver: subprocess.Popen[str], seconds: float) -> tuple[Table, int]:
        """The table MLflow has once the submission has ended well, and how many attempts of cells it took."""
        try:
            code = driver.wait(seconds)
        except subprocess.TimeoutExpired as e:
            raise BrokenError(f"not done after {seconds:.0f} s: {self.said()}") from e
        if code:
            raise BrokenError(f"exit {code}: {self.said()}")
        store = Store(MLFLOW)
        found = store.records("quickstart")
        report = [sys.executable, "-m", "lmu_dist.cli", "report", "quickstart", "-o", str(self.folder / "report")]
        if subprocess.run(report, env=self.environment, capture_output=True).returncode:
            raise BrokenError("no report of it")
        attempts = sum(int(store.client.get_run(run_id).data.tags["lmu.attempt"]) for run_id in found)
        return {
            (r.family, r.n_params, r.planned_tokens, r.seed): (r.status, r.tokens, r.val_loss_nats) for r in found.values()
        }, attempts

    def said(self) -> str:
        """The last lines of the submission."""
        return "\n    ".join((self.folder / "submit.log").read_text().splitlines()[-12:])

    def midway(self) -> None:
        """Waits until a cell has ended and the next, of the same trunk, has a checkpoint."""
        runs = self.folder / "runs"
        wait(lambda: list(runs.glob("*/*/record.json")), 900, "a cell has ended")
        ended = {path.parent for path in runs.glob("*/*/record.json")}
        wait(lambda: {path.parents[1] for path in runs.glob("*/*/step-*/meta.json")} - ended, 900, "another has a checkpoint")


def plain(world: World) -> subprocess.Popen[str]:
    """Nothing happens."""
    return world.submit()


def wrong_token(world: World) -> subprocess.Popen[str]:
    """Another token is refused in a line, by the Jobs API and by Ray itself; then the right one works."""
    (world.folder / "wrong").write_text(secrets.token_hex(32))
    wrong = {"RAY_AUTH_TOKEN_PATH": str(world.folder / "wrong")}
    driver = world.submit(**wrong)
    if driver.wait(60) != 2 or "refuses the token" not in world.said():
        raise BrokenError(f"submit with a wrong token: exit {driver.returncode}: {world.said()}")
    inside = ["ip", "netns", "exec", "lmu-node-1", sys.executable, "-m", "lmu_dist.cli", "ladder", "jobs/quickstart.yaml"]
    done = subprocess.run(
        [*inside, *world.overrides, f"cluster.address={NET}.1:6379"],
        cwd=ROOT,
        env=world.environment | wrong,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 2 or "Authentication token is missing or incorrect" not in done.stderr:
        raise BrokenError(f"ladder with a wrong token: exit {done.returncode}: {done.stderr}")
    return world.submit()


def node_killed(world: World) -> subprocess.Popen[str]:
    """A node dies in the middle of a cell, and another takes its place."""
    driver = world.submit()
    world.midway()
    world.kill("node-2")
    wait(lambda: world.living() == 2, 120, "Ray has noticed")
    world.start_node("node-3")
    return driver


def cut(world: World) -> subprocess.Popen[str]:
    """The network of a node is down for half a minute in the middle of a cell."""
    driver = world.submit()
    world.midway()
    ip("link set lmu-node-2 down")
    time.sleep(CUT_SECONDS)
    ip("link set lmu-node-2 up")
    return driver


def head_restarted(world: World) -> subprocess.Popen[str]:
    """The head dies in the middle of a cell, and with it the job; the cluster is started anew, and the same is submitted."""
    driver = world.submit()
    world.midway()
    for name in ("head", "node-1", "node-2"):
        world.kill(name)
    world.start_head()
    world.start_node("node-1")
    world.start_node("node-2")
    if (code := driver.wait(120)) != 1:
        raise BrokenError(f"the submission that was lost ended with {code}: {world.said()}")
    return world.submit()


def wrong_password(world: World) -> subprocess.Popen[str]:
    """MLflow refuses a wrong password, in a line and before anything starts (with --postgres); a report reads from it."""
    wrong = {"MLFLOW_TRACKING_PASSWORD": "wrong"}
    for command in (["ladder", "jobs/quickstart.yaml", *world.overrides], ["report", "quickstart"]):
        done = subprocess.run(
            [sys.executable, "-m", "lmu_dist.cli", *command],
            cwd=ROOT, env=world.environment | wrong, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode != 2 or "refuses the user or the password" not in done.stderr.splitlines()[-1]:
            raise BrokenError(f"{command[0]} with a wrong password: exit {done.returncode}: {done.stderr}")
    if (world.folder / "runs").exists():
        raise BrokenError("something was started with a wrong password")
    return world.submit()


SCENARIOS: dict[str, Callable[[World], subprocess.Popen[str]]] = {
    f.__name__.replace("_", "-"): f for f in (plain, wrong_token, wrong_password, node_killed, cut, head_restarted)
}


BREAKING = ("node-killed", "head-restarted")  # a network that is back soon may go by unnoticed


def main() -> int:
    """Runs the scenarios asked for, `plain` first: its table is what the others' must be, to the last bit."""
    parser = ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--whole", action="store_true", help="the whole of jobs/quickstart.yaml, eight minutes each")
    parser.add_argument("--postgres", action="store_true", help="MLflow on PostgreSQL, behind passwords")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    asked = parser.parse_args()
    if unknown := set(asked.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(unknown)}")
    if reason := why_not() or (asked.postgres and databases.missing()):
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
                with World(asked.whole, asked.postgres) as world:
                    table, attempts = world.finish(SCENARIOS[name](world), 7200 if asked.whole else 1200)
                if any(status != "complete" for status, _, _ in table.values()):
                    raise BrokenError(f"not all cells are complete: {table}")
                reference = reference or table
                if name in BREAKING and attempts == len(table):
                    raise BrokenError("nothing was broken by it: every cell took one attempt")
                if table != reference:
                    raise BrokenError(f"another table: {table}, and not {reference}")
                how = f"ok, {len(table)} cells in {attempts} attempts, losses equal"
            except (BrokenError, ConfigError, FailedError, subprocess.SubprocessError) as e:
                how, failed = f"FAILED: {e}", True
            print(f"{name:<16}{time.monotonic() - began:6.0f} s  {how}", flush=True)
            if reference is None:
                return 1
    return 1 if failed else 0


def why_not() -> str | None:
    """Why this machine cannot."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need ip, of iproute2"
    try:
        ip(f"netns add lmu-try-{os.getpid()}")
        ip(f"netns del lmu-try-{os.getpid()}")
    except subprocess.CalledProcessError as e:
        return f"no network namespaces here: {e.stderr.strip()}"
    return None


def ip(arguments: str) -> None:
    """Runs ip. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def sweep() -> None:
    """Removes bridge, links and namespaces, also those of a run that was killed."""
    for name in HOSTS:
        # The link first: it would go with its namespace, at some later moment.
        if Path(f"/sys/class/net/lmu-{name}").exists():
            ip(f"link del lmu-{name}")
        if Path(f"/run/netns/lmu-{name}").exists():
            ip(f"netns del lmu-{name}")
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        ip(f"link del {BRIDGE}")


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for a condition. Raises BrokenError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BrokenError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.2)


def answers(url: str, token: str = "") -> bytes:
    """The body; nothing where nobody answers."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return response.read()
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
