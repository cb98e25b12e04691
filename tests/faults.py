"""Breaks something while a small study is prepared and trained, in one way per scenario. Nothing may be lost.

    python tests/faults.py [--json FILE] [SCENARIO ...]       disks need root; all scenarios take about 25 minutes on two cores

Each scenario starts from the same configuration in folders of its own: a home (corpora and runs), a temporary folder, a cache
and one for MLflow. Where a disk fills, the folder is a small tmpfs. The command must end with the table of an undisturbed run,
to the last bit, or with one line that says what to do; after that is done, the same command must end with that table. No
traceback may be shown and no process may remain. Prints one line per scenario; exits with 1 if one failed.
"""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import write_corpus  # noqa: E402

from lmu_dist import records  # noqa: E402
from lmu_dist.launch.local_commands import free_port  # noqa: E402
from lmu_dist.records import RunRecord  # noqa: E402
from lmu_dist.tracking.runs import records_of  # noqa: E402
from lmu_dist.tracking.store import Store, default_uri  # noqa: E402

EXPERIMENT, MARK = "faults", "LMU_DIST_FAULTS"  # the variable marks all processes of a scenario
JOB = """
experiment: faults
storage: runs
data: {source: files, files: [%s], tokenizer: {vocab_tokens: 400}}
train:
  schedule: wsd
  sequence_tokens: 32
  batch_tokens: 256
  warmup_tokens: 2560
  eval_every_tokens: 64_000
  eval_tokens: 2048
cluster: {n_workers: 1, checkpoint_every_steps: 50}
ladder: {families: [transformer], n_params: [3000], tokens: [51_200, 102_400], seeds: [0, 1]}
"""
TRUNK_STEPS = 440  # of the two cells of a seed, which share the first 160
MOST_SECONDS = 300.0
WENT_ON = "went on"  # the outcome of a command that a fault did not stop
Table = dict[str, tuple[str, int, float, float, int]]  # key: status, tokens, losses in nats, number of points of the curve


class BrokenError(Exception):
    """A scenario failed."""


class Study:
    """The folders of a scenario and the command in them."""

    def __init__(self, root: Path, small_disks: dict[str, int] | None = None) -> None:
        """`small_disks`: size in MB of the tmpfs in place of a folder (home, tmp, cache, mlflow)."""
        self.root, self.cleanup = root, ExitStack()
        self.mark = f"{os.getpid()}-{root.name}"
        for name in ("home", "tmp", "cache", "mlflow"):
            (root / name).mkdir()
            if size := (small_disks or {}).get(name):
                self._mount(root / name, size)
        self.home, self.uri = root / "home", default_uri(root / "mlflow")
        self.environment = os.environ | {
            "LMU_DIST_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": self.uri,
            "XDG_CACHE_HOME": str(root / "cache"),
            "TMPDIR": str(root / "tmp"),
            "RAY_TMPDIR": tempfile.gettempdir(),
            MARK: self.mark,
        }
        (root / "job.yaml").write_text(JOB % (root.parent / "corpus" / "*.jsonl"))

    def _mount(self, folder: Path, megabytes: int) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
        self.cleanup.callback(subprocess.run, ["umount", "-l", str(folder)])

    def use_server(self, port: int) -> None:
        """Uses an MLflow server at this port instead of a file."""
        self.uri = self.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"

    def start(self, *arguments: str, n_cpus: int | None = None, output: str = "output") -> subprocess.Popen[str]:
        """Starts lmu-dist, by default the ladder, on all CPUs or on some."""
        command = [sys.executable, "-m", "lmu_dist.cli", *(arguments or ("ladder", str(self.root / "job.yaml")))]
        if n_cpus is not None:
            command = ["taskset", "--cpu-list", f"0-{n_cpus - 1}", *command]
        log = (self.root / output).open("w")
        return subprocess.Popen(
            command,
            cwd=self.home,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def output(self) -> str:
        """What the last command printed."""
        return (self.root / "output").read_text()

    def finish(self, process: subprocess.Popen[str]) -> int:
        """Waits for the command. Returns its exit code. Raises BrokenError."""
        try:
            code = process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired as e:
            self.kill_all()
            raise BrokenError(f"did not end within {MOST_SECONDS:.0f} s: {self.tail()}") from e
        if "Traceback" in self.output():
            raise BrokenError(f"showed a traceback: {self.output()}")
        return code

    def tail(self) -> str:
        """The last lines of the output."""
        return " | ".join(self.output().splitlines()[-4:])

    def message(self) -> str:
        """The line that says what is wrong and what to do. Raises BrokenError if there is none, or more than one.

        A ladder repeats the line for every cell that failed.
        """
        text = " ".join(self.output().split())
        lines = {line.strip() for line in re.split(r"lmu-dist: |failed: \S+: ", text)[1:]}
        lines = {re.split(r" \d+ cells ended, | run the same command again to continue with", line)[0] for line in lines}
        # Two runs that fail at once have files of their own: in folders of their own, or different ones of the same full disk.
        lines = {re.sub(r"'/[^']*/", "'.../", line) for line in lines}
        lines = {re.sub(r"(the disk is full): '[^']*'", r"\1: ...", line) for line in lines}
        if len(lines) != 1:
            raise BrokenError(f"{len(lines)} messages instead of one: {self.output()}")
        return lines.pop()

    def wait_until(self, reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Waits for a moment of the command. Raises BrokenError if the command ends before."""
        deadline = time.monotonic() + MOST_SECONDS
        while not reached():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BrokenError(f"the command ended before the fault: {self.tail()}")
            time.sleep(0.01)

    def steps_logged(self) -> int:
        """Training steps in the metrics logs of all runs, those before a branch point once."""
        logs = self.home.glob("runs/*/*/metrics_log.jsonl")
        return sum(log.read_bytes().count(b'"train/loss_nats"') for log in logs)

    def processes(self) -> list[psutil.Process]:
        """The live processes of the scenario."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def process_named(self, name: str) -> psutil.Process:
        """The process of a Ray actor or worker whose title contains a name. Raises BrokenError if there is none."""
        for process in psutil.Process(os.getpid()).children(recursive=True) + self.processes():
            with suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    return process
        raise BrokenError(f"no process {name}")

    def check_nothing_left(self) -> None:
        """Raises BrokenError if processes of the scenario are alive half a minute after the command."""
        deadline = time.monotonic() + 30
        while left := self.processes():
            if time.monotonic() > deadline:
                names = ", ".join(" ".join(p.cmdline())[:60] for p in left)
                self.kill_all()
                raise BrokenError(f"left {len(left)} processes behind: {names}")
            time.sleep(0.2)

    def kill_all(self) -> None:
        """Kills the processes of the scenario."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def table(self) -> Table:
        """The results in the folders; MLflow must have the same ones. Raises BrokenError."""
        paths = self.home.glob("runs/*/*/record.json")
        in_folders = {r.key: r for r in (RunRecord.from_json(json.loads(path.read_text())) for path in paths)}
        store = Store(self.uri)
        in_mlflow = {r.key: (run_id, r) for run_id, r in records_of(store, EXPERIMENT).items()}
        if {key: r.val_loss_nats for key, r in in_folders.items()} != {k: r.val_loss_nats for k, (_, r) in in_mlflow.items()}:
            raise BrokenError(f"MLflow has {len(in_mlflow)} of {len(in_folders)} results, or other ones")
        table = Table()
        for key, (run_id, r) in in_mlflow.items():
            points = [p.step for p in store.client.get_metric_history(run_id, records.TRAIN_LOSS)]
            if len(set(points)) != len(points):
                raise BrokenError(f"{len(points) - len(set(points))} points are twice in MLflow")
            table[key] = (r.status, r.tokens, r.train_loss_nats, r.val_loss_nats, len(points))
        return table


Scenario = Callable[[Study], str]  # breaks something, mends it; returns "went on" or the line that the command printed
SCENARIOS: dict[str, Scenario] = {}
SMALL_DISKS: dict[str, dict[str, int]] = {}


def scenario(name: str, **small_disks: int) -> Callable[[Scenario], Scenario]:
    """Registers a scenario, with the sizes in MB of its small disks."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[name], SMALL_DISKS[name] = function, small_disks
        return function

    return register


def run_once(study: Study, break_it: Callable[[], object], moment: Callable[[], bool], mend: Callable[[], object]) -> str:
    """Runs the ladder, breaks something at a moment of it, and mends it when the command has ended."""
    process = study.start()
    study.wait_until(moment, process)
    break_it()
    code = study.finish(process)
    outcome = WENT_ON if code == 0 else f"exit {code}: {study.message()}"
    mend()
    return outcome


# Disks that fill


def fill(folder: Path, left_bytes: int = 0) -> Path:
    """Fills the disk of a folder but for some bytes. Returns the file that fills it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        file.write(bytes(max(0, shutil.disk_usage(folder).free - left_bytes)))
        while not left_bytes:
            file.write(bytes(4096))
    return filler


def disk_full(study: Study, folder: str, moment: Callable[[], bool], left_bytes: int = 0) -> str:
    """The disk of a folder is full from a moment of the command until it has ended."""
    place = study.root / folder
    return run_once(study, lambda: fill(place, left_bytes), moment, lambda: (place / "filler").unlink())


@scenario("disk-full-preparing", home=4)
def _(study: Study) -> str:
    filler = fill(study.home, 150_000)
    code = study.finish(study.start())
    outcome = f"exit {code}: {study.message()}"
    filler.unlink()
    return outcome


@scenario("disk-full-log", home=64)
def _(study: Study) -> str:
    return disk_full(study, "home", lambda: study.steps_logged() >= 120)


@scenario("disk-full-second-cell", home=64)
def _(study: Study) -> str:
    return disk_full(study, "home", lambda: study.steps_logged() >= TRUNK_STEPS + 60, 20_000)


@scenario("disk-full-checkpoint", tmp=64)
def _(study: Study) -> str:
    return disk_full(study, "tmp", lambda: study.steps_logged() >= 120)


@scenario("disk-full-mlflow", mlflow=16)
def _(study: Study) -> str:
    return disk_full(study, "mlflow", lambda: study.steps_logged() >= 120)


@scenario("disk-full-cache", cache=64)
def _(study: Study) -> str:
    filler = fill(study.root / "cache")
    code = study.finish(study.start())
    filler.unlink()
    return WENT_ON if code == 0 else f"exit {code}: {study.message()}"


# Damaged files


def train_ladder(study: Study) -> None:
    """Runs the ladder to its end."""
    if code := study.finish(study.start()):
        raise BrokenError(f"exit {code}: {study.tail()}")


def interrupt_at(study: Study, n_steps: int) -> None:
    """Runs the first trunk of the ladder up to a step and interrupts it."""
    process = study.start(n_cpus=1)
    study.wait_until(lambda: study.steps_logged() >= n_steps, process)
    os.kill(process.pid, signal.SIGINT)
    study.finish(process)


def flip_bits(path: Path, every: int = 200) -> None:
    """Flips one bit in every 200th byte of a file."""
    content = bytearray(path.read_bytes())
    for i in range(0, len(content), every):
        content[i] ^= 1
    path.write_bytes(content)


def refused_until(study: Study, mend: Callable[[], None]) -> str:
    """The command must refuse to run. Then something is mended."""
    code = study.finish(study.start())
    if not code:
        raise BrokenError("the fault was not noticed")
    outcome = f"exit {code}: {study.message()}"
    mend()
    return outcome


@scenario("corpus-damaged")
def _(study: Study) -> str:
    study.finish(study.start("prepare", str(study.root / "job.yaml")))
    [corpus] = study.home.glob("runs/data/*/train.bin")
    flip_bits(corpus)
    return refused_until(study, lambda: shutil.rmtree(corpus.parent))


@scenario("corpus-damaged-between-starts")
def _(study: Study) -> str:
    interrupt_at(study, 120)
    [corpus] = study.home.glob("runs/data/*/validation.bin")
    flip_bits(corpus)
    return refused_until(study, lambda: shutil.rmtree(corpus.parent))


@scenario("newest-checkpoint-damaged")
def _(study: Study) -> str:
    interrupt_at(study, 180)
    flip_bits(max(study.home.glob("runs/*/*/step-*")) / "model.safetensors")
    return WENT_ON if study.finish(study.start()) == 0 else f"exit: {study.message()}"


@scenario("all-checkpoints-damaged")
def _(study: Study) -> str:
    interrupt_at(study, 180)
    weights = list(study.home.glob("runs/*/*/step-*/model.safetensors"))
    for path in weights:
        flip_bits(path)
    return refused_until(study, lambda: shutil.rmtree(weights[0].parents[1]))


@scenario("log-torn")
def _(study: Study) -> str:
    interrupt_at(study, 180)
    log = max(study.home.glob("runs/*/*/metrics_log.jsonl"), key=lambda path: path.stat().st_size)
    lines = log.read_bytes().splitlines(keepends=True)
    middle = next(i for i, line in enumerate(lines) if b'"tags"' in line and i > 3)
    lines[middle] = lines[middle][:20] + b"\n"
    log.write_bytes(b"".join(lines))
    return WENT_ON if study.finish(study.start()) == 0 else f"exit: {study.message()}"


# MLflow


@contextmanager
def locked(study: Study) -> Iterator[None]:
    """MLflow's SQLite file is locked by another program while the block runs."""
    connection = sqlite3.connect(study.root / "mlflow" / "mlflow.db", timeout=30, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.rollback()
        connection.close()


def lock_at(study: Study, n_steps: int) -> str:
    """MLflow is locked from a step of the ladder until the command has ended."""
    lock = ExitStack()
    return run_once(study, lambda: lock.enter_context(locked(study)), lambda: study.steps_logged() >= n_steps, lock.close)


@scenario("mlflow-locked-at-start")
def _(study: Study) -> str:
    study.finish(study.start("prepare", str(study.root / "job.yaml")))
    Store(study.uri).client.search_experiments()
    with locked(study):
        code = study.finish(study.start())
        return WENT_ON if code == 0 else f"exit {code}: {study.message()}"


@scenario("mlflow-locked-when-a-trial-starts")
def _(study: Study) -> str:
    lock = ExitStack()
    database = study.root / "mlflow" / "mlflow.db"

    def planned() -> bool:
        return database.exists() and bool(list((study.root / "mlflow").rglob("plan.json")))

    return run_once(study, lambda: lock.enter_context(locked(study)), planned, lock.close)


@scenario("mlflow-locked-in-the-middle")
def _(study: Study) -> str:
    return lock_at(study, 120)


@scenario("mlflow-locked-at-end")
def _(study: Study) -> str:
    return lock_at(study, 2 * TRUNK_STEPS - 60)


@scenario("mlflow-file-deleted")
def _(study: Study) -> str:
    files = list[Path]()

    def delete() -> None:
        files.extend((study.root / "mlflow").glob("mlflow.db*"))
        for path in files:
            path.unlink()

    return run_once(study, delete, lambda: study.steps_logged() >= 120, lambda: None)


@scenario("mlflow-read-only", mlflow=32)
def _(study: Study) -> str:
    folder = str(study.root / "mlflow")

    def mount_read_only() -> None:
        # A bind mount, because a disk with files that are open for writing cannot be made read-only.
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    return run_once(
        study,
        mount_read_only,
        lambda: study.steps_logged() >= 120,
        lambda: subprocess.run(["umount", "-l", folder], check=True),
    )


class Server:
    """An MLflow server on loopback that can be stopped, started and slowed down."""

    def __init__(self, study: Study) -> None:
        self.study, self.port = study, free_port()
        study.use_server(self.port)
        self.process: subprocess.Popen[bytes] | None = None
        study.cleanup.callback(self.stop)

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        folder = self.study.root / "mlflow"
        options = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
        command = [sys.executable, "-m", "mlflow", "server", *options, "--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        with (self.study.root / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.2)
        raise BrokenError("the MLflow server did not start")

    def stop(self) -> None:
        """Kills the server."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@scenario("mlflow-server-absent-at-start")
def _(study: Study) -> str:
    server = Server(study)
    code = study.finish(study.start())
    server.start()
    return WENT_ON if code == 0 else f"exit {code}: {study.message()}"


@scenario("mlflow-server-killed-in-the-middle")
def _(study: Study) -> str:
    server = Server(study)
    server.start()
    return run_once(study, server.stop, lambda: study.steps_logged() >= 120, server.start)


@scenario("mlflow-server-killed-at-end")
def _(study: Study) -> str:
    server = Server(study)
    server.start()
    return run_once(study, server.stop, lambda: study.steps_logged() >= 2 * TRUNK_STEPS - 60, server.start)


@scenario("mlflow-server-slow")
def _(study: Study) -> str:
    server = Server(study)
    server.start()
    relay = free_port()
    stop = threading.Event()
    thread = threading.Thread(target=relay_slowly, args=(relay, server.port, 1.0, stop), daemon=True)
    thread.start()
    study.use_server(relay)
    try:
        return WENT_ON if study.finish(study.start()) == 0 else f"exit: {study.message()}"
    finally:
        study.use_server(server.port)
        stop.set()


def relay_slowly(port: int, to: int, delay_seconds: float, stop: threading.Event) -> None:
    """Forwards connections from one port of loopback to another, each answer some time later."""

    def pump(source: socket.socket, sink: socket.socket, delay: float) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                time.sleep(delay)
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(0.5)
        while not stop.is_set():
            with suppress(TimeoutError):
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", to))
                for pair in ((near, far, 0.0), (far, near, delay_seconds)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()


# Killed processes


def signalled(study: Study, name: str, number: int, n_steps: int = 120) -> str:
    """A process of the ladder gets a signal in the middle: "" is the driver, otherwise part of a process's title."""
    process = study.start()
    study.wait_until(lambda: study.steps_logged() >= n_steps, process)
    os.kill(process.pid if not name else study.process_named(name).pid, number)
    code = study.finish(process)
    if code in (0, -signal.SIGKILL):
        return WENT_ON if code == 0 else "killed"
    return f"exit {code}: {study.message()}"


@scenario("worker-killed-in-the-second-trunk")
def _(study: Study) -> str:
    process = study.start(n_cpus=1)  # so that one group of workers trains both trunks
    study.wait_until(lambda: study.steps_logged() >= TRUNK_STEPS + 120, process)
    os.kill(study.process_named("RayTrainWorker").pid, signal.SIGKILL)
    return WENT_ON if study.finish(process) == 0 else f"exit: {study.message()}"


@scenario("two-drivers")
def _(study: Study) -> str:
    processes = [study.start(n_cpus=1, output=name) for name in ("output", "output-of-the-second")]
    codes = [study.finish(process) for process in processes]
    return WENT_ON if codes == [0, 0] else f"exit {codes}: {study.message()}"


GREEDY = """
import torch
from lmu_dist.models.families.transformer import Transformer

class Greedy(Transformer):
    name = "greedy"
    title = "greedy"

    def mixer(self, shape, options):
        mixer = super().mixer(shape, options)
        if shape.vocab_tokens == 400:  # not in the checks of a new family
            mixer.register_forward_hook(lambda *_: torch.empty(2**50) and None)
        return mixer
"""


@scenario("run-out-of-memory")
def _(study: Study) -> str:
    (study.root / "greedy.py").write_text(GREEDY)
    families = f"ladder.families=[transformer, {study.root}/greedy.py:Greedy]"
    overrides = (families, "ladder.seeds=[0]", "cluster.max_failures=1")
    # Of the two trunks, one at a time, the first fails.
    code = study.finish(study.start("ladder", str(study.root / "job.yaml"), *overrides, n_cpus=1))
    if len(list(study.home.glob("runs/transformer-*/*/record.json"))) != 2:
        raise BrokenError(f"the other family was not trained: {study.output()}")
    return f"exit {code}: {study.message()}"


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
    for who, title in (("driver", ""), ("worker", "RayTrainWorker"), ("recorder", "MetricsLogger")):
        if title and number == signal.SIGINT:
            continue  # nobody sends it to one of Ray's processes
        scenario(f"{who}-{number.name.lower()}")(
            lambda study, title=title, number=number: signalled(study, title, number)  # type: ignore[misc]
        )

    @scenario(f"prepare-{number.name.lower()}")
    def _(study: Study, number: signal.Signals = number) -> str:
        large = study.root / "large"
        write_corpus(large, n_documents=40_000, n_files=8, seed=1)
        override = f"data.files=[{large}/*.jsonl]"
        process = study.start("prepare", str(study.root / "job.yaml"), override)
        study.wait_until(lambda: bool(list(study.home.glob("runs/data/*/parts/*.json"))), process)
        os.kill(process.pid, number)
        code = study.finish(process)
        study.check_nothing_left()
        outcome = "killed" if code == -signal.SIGKILL else f"exit {code}: {study.message()}"
        if study.finish(study.start("prepare", str(study.root / "job.yaml"), override)):
            raise BrokenError(f"did not go on: {study.tail()}")
        return outcome


def run(name: str, folder: Path, reference: Table | None) -> tuple[str, Table]:
    """Runs a scenario in a new folder. Returns what happened, and the table at the end. Raises BrokenError."""
    root = folder / name
    root.mkdir()
    study = Study(root, SMALL_DISKS.get(name))
    try:
        outcome = SCENARIOS[name](study) if name in SCENARIOS else ""
        study.check_nothing_left()
        if outcome != WENT_ON or "MLflow does not have all" in study.output():
            train_ladder(study)  # the same command
            study.check_nothing_left()
        table = study.table()
        if reference is not None and table != reference:
            raise BrokenError(f"{outcome}; but other results: {table} instead of {reference}")
        return outcome, table
    finally:
        study.kill_all()
        study.cleanup.close()
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    """Runs the scenarios given, or all; first the undisturbed ladder."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    asked = parser.parse_args()
    if unknown := set(asked.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    chosen = asked.scenarios or list(SCENARIOS)
    if any(SMALL_DISKS[name] for name in chosen) and os.geteuid() != 0:
        print("scenarios with small disks need root; name others")
        return 3
    found: list[dict[str, Any]] = []
    reference: Table | None = None
    with tempfile.TemporaryDirectory(prefix="lmu-faults-") as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus")
        for name in ["undisturbed", *chosen]:
            began = time.monotonic()
            try:
                outcome, table = run(name, folder, reference)
                reference, ok = reference or table, True
            except (BrokenError, OSError, psutil.Error, subprocess.SubprocessError) as e:
                outcome, ok = str(e), False
            found.append({"scenario": name, "seconds": time.monotonic() - began, "ok": ok, "outcome": outcome})
            print(f"{'ok' if ok else 'FAILED':<8}{name:<36}{time.monotonic() - began:5.0f} s  {outcome}", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n")
            if reference is None:
                return 1
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
