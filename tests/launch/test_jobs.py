"""Submitting and following: mostly against a small fake of the Jobs API that loses connections; once on a real Ray head."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import psutil
import pytest
import ray
from aiohttp import web
from conftest import write_corpus
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from lmu_dist import show
from lmu_dist.cli import main
from lmu_dist.config import load
from lmu_dist.launch import jobs, submission
from lmu_dist.launch.jobs import AwayError, UnknownJobError, connect, follow, submit
from lmu_dist.launch.submission import Draft, draft

# Ray warns of itself, and leaves sockets to the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
LOG = "".join(f"line {i}: übung\n" for i in range(400)) + "no line break at the end"


class Fake:
    """The Jobs API as far as it is used, on loopback, in a thread of its own; it goes away and loses its memory at will."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.bodies: list[str] = []  # of all that was sent
        self.cuts: list[int] = []  # characters after which the log breaks off, once each
        self.away = 0  # requests that find nobody
        self.ray_version, self.answers_submissions, self.status_after_log = ray.__version__, True, "SUCCEEDED"
        self.began, self.goes_silent = 1_700_000_000_000, False
        self.address = ""

    def end(self, status: str = "SUCCEEDED") -> None:
        for job in self.jobs.values():
            job["status"] = status

    @web.middleware
    async def _middle(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.away:
            self.away -= 1
            assert request.transport is not None
            request.transport.abort()
        return await handler(request)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ray_version": self.ray_version, "version": "4"})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.text()
        self.bodies.append(body)
        wanted = json.loads(body)
        self.jobs[wanted["submission_id"]] = wanted | {"status": "RUNNING", "start_time": self.began, "type": "SUBMISSION"}
        if not self.answers_submissions:
            return web.Response(status=500, text="Traceback\nTimeoutError: of the agent")
        return web.json_response({"submission_id": wanted["submission_id"], "job_id": wanted["submission_id"]})

    async def _info(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["name"])
        return web.json_response(job) if job else web.Response(status=404, text="does not exist")

    async def _stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["name"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        cut = self.cuts.pop(0) if self.cuts else len(LOG)
        for start in range(0, cut, 100):
            await answer.send_str(LOG[start : min(start + 100, cut)])
        if cut < len(LOG) and self.goes_silent:
            await asyncio.sleep(2)
        elif cut < len(LOG):
            assert request.transport is not None
            request.transport.abort()
        else:
            self.jobs[request.match_info["name"]]["status"] = self.status_after_log
        return answer

    async def _package(self, request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=404 if request.method == "GET" else 200)

    def _serve(self, ready: threading.Event) -> None:
        async def run() -> None:
            app = web.Application(middlewares=[self._middle], client_max_size=10**9)
            app.router.add_get("/api/version", self._version)
            app.router.add_get("/api/jobs/", self._list)
            app.router.add_post("/api/jobs/", self._submit)
            app.router.add_get("/api/jobs/{name}", self._info)
            app.router.add_post("/api/jobs/{name}/stop", self._stop)
            app.router.add_get("/api/jobs/{name}/logs/tail", self._tail)
            app.router.add_route("*", "/api/packages/{protocol}/{name}", self._package)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._over.wait()
            await runner.cleanup()

        asyncio.run(run())

    def __enter__(self) -> "Fake":
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # also takes back what connect sets
    monkeypatch.setattr(jobs, "PAUSES_SECONDS", (0.01, 0.05))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job and its corpus."""
    root = tmp_path / "work"
    write_corpus(root / "corpus")
    tree = {
        "experiment": "tests",
        "storage": str(tmp_path / "storage"),
        "data": {"source": "files", "files": ["corpus/*.jsonl"], "tokenizer": {"vocab_tokens": 400}},
        "model": {"n_params": 3000},
        "train": {"tokens": 25_600, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560, "eval_tokens": 512},
        "cluster": {"n_workers": 1},
    }
    (root / "job.yaml").write_text(json.dumps(tree))
    monkeypatch.chdir(root)
    return root


def drafted(folder: Path, *overrides: str) -> Draft:
    return draft(load(folder / "job.yaml", overrides), folder / "job.yaml", overrides, None, folder)


def test_what_is_said_to_travel_is_what_ray_packs(folder: Path, tmp_path: Path):
    for name in (
        "kept/.gitignore",
        "kept/a.bin",
        "kept/b.txt",
        "runs/x/deep.bin",
        "big.bin",
        ".git/config",
        "m/__pycache__/m.pyc",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("runs/\n*.bin\n")
    (folder / "kept" / ".gitignore").write_text("b.*\n")
    (folder / ".rayignore").write_text("corpus/part-3.jsonl\n")
    (folder / "job.yaml").write_text((folder / "job.yaml").read_text().replace("corpus/*", "corpus/part-[0-2]*"))
    package = drafted(folder).package
    target = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    with ZipFile(target) as packed:
        assert {entry.filename: entry.file_size for entry in packed.infolist() if not entry.is_dir()} == package.files
    assert package.left_out.keys() == {"runs/", "big.bin", "kept/a.bin", "kept/b.txt", "corpus/part-3.jsonl"}
    assert package.left_out["runs/"] == len("runs/x/deep.bin")


def test_what_git_ignores_by_rules_of_elsewhere_stays_here(folder: Path, tmp_path: Path):
    subprocess.run(["git", "init", "-q", folder.parent], check=True)
    (folder.parent / ".gitignore").write_text(".env\nweights \\[1\\]*\n")
    for name in (".env", "weights [1].bin", "weights.txt"):
        (folder / name).write_text(name)
    package = drafted(folder).package
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=list(package.excludes))
    with ZipFile(tmp_path / "package.zip") as packed:
        assert {entry.filename for entry in packed.infolist() if not entry.is_dir()} == set(package.files)
    assert package.left_out.keys() == {".env", "weights [1].bin"}
    assert "weights.txt" in package.files


def test_a_store_that_only_this_machine_reaches_is_not_sent(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for uri in ("http://127.0.0.1:5000", "http://localhost:5000", f"sqlite:///{folder}/mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        job = drafted(folder)
        assert "MLFLOW_TRACKING_URI" not in job.environment
        assert any("the cluster's own is taken" in note for note in job.notes)
    name = job.name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert drafted(folder).name != name


def test_a_name_is_of_the_content_alone(folder: Path):
    (folder / ".gitignore").write_text("runs/\n")
    name = drafted(folder).name
    assert name.startswith("train-tests-")
    (folder / "runs").mkdir()
    (folder / "runs" / "losses").write_text("1")
    os.utime(folder / "job.yaml", (1, 1))
    assert drafted(folder).name == name
    assert drafted(folder, "seed=1").name != name
    (folder / "more.py").write_text("")
    assert drafted(folder).name != name


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("", ["job.yaml", "train.lerning_rate=1"], "did you mean train.learning_rate?"),
        ("", ["job.yaml", "--command", "ladder"], "no section ladder"),
        ("", ["../outside.yaml"], "outside.yaml lies outside"),
        ("echo 'include: ../outside.yaml' > including.yaml", ["including.yaml"], "outside.yaml lies outside"),
        ("echo job.yaml > .gitignore", ["job.yaml"], "the configuration: job.yaml would not be sent"),
        ("echo 'corpus/*2*' > .gitignore", ["job.yaml"], "part-2.jsonl would not be sent"),
        ("", ["job.yaml", "data.files=[none/*.jsonl]"], "data.files: none/*.jsonl is not in"),
        ("", ["job.yaml", "data.tokenizer={kind: file, path: t.json}"], "data.tokenizer.path: t.json is not in"),
        ("head -c 300000 /dev/zero > large.bin", ["job.yaml"], "the largest are large.bin"),
        ("", ["job.yaml"], "give the address of the cluster's dashboard"),
        ("", ["job.yaml", "--address", "10.0.0.1:6379"], "not 10.0.0.1:6379"),
        ("", ["job.yaml", "--address", "http://me:secret@head:8265"], "--address holds credentials"),
        ("", ["job.yaml", "--address", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(change: str, arguments, message: str, folder: Path, monkeypatch, capfd):
    shutil.copy(folder / "job.yaml", folder.parent / "outside.yaml")
    monkeypatch.setattr(submission, "GCS_STORAGE_MAX_SIZE", 300_000)
    subprocess.run(change, shell=True, check=True)
    assert main(["submit", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "secret" not in error
    assert len([line for line in error.splitlines() if line.startswith("lmu-dist:")]) == 1


def test_another_ray_or_no_ray_is_named(fake: Fake, capfd: pytest.CaptureFixture[str]):
    fake.ray_version = "2.40.0"
    assert main(["jobs", "list", "--address", fake.address]) == 2
    assert "runs Ray 2.40.0" in capfd.readouterr().err
    assert main(["jobs", "list", "--address", f"{fake.address}/elsewhere"]) == 2
    assert "is no dashboard of Ray" in capfd.readouterr().err


def test_settings_arrive_as_they_were_typed(folder: Path):
    typed = ["data.text_field=a 'b' \"c\" $HOME `id` \\ ; *", "seed=3"]
    told = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    entrypoint = drafted(folder, *typed).entrypoint.replace("python -m lmu_dist.cli", told)
    out = subprocess.run(entrypoint, shell=True, check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == ["train", "job.yaml", *typed]


def test_secrets_stay_here(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example")
    assert main(["submit", "job.yaml", "--address", fake.address]) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert main(["submit", "job.yaml", "--address", fake.address]) == 0
    said = "".join(capfd.readouterr())
    assert "AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD" in said
    assert "hunter2" not in said + "".join(fake.bodies)
    [body] = map(json.loads, fake.bodies)
    assert body["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    assert body["metadata"]["experiment"] == "tests"
    assert "entrypoint_num_cpus" not in body  # so that Ray keeps it on the head


def test_what_has_not_ended_is_not_submitted_again(fake: Fake, folder: Path, capfd: pytest.CaptureFixture[str]):
    client, job = connect(fake.address), drafted(folder)
    assert submit(client, job) == (job.name, True)
    assert submit(client, job) == (job.name, False)
    for status, number in (("SUCCEEDED", 2), ("FAILED", 3), ("STOPPED", 4)):
        fake.end(status)
        assert submit(client, job) == (f"{job.name}-{number}", True)
    assert submit(client, job) == (f"{job.name}-4", False)
    fake.jobs.clear()  # as a new cluster
    assert submit(client, job) == (job.name, True)
    assert main(["submit", "job.yaml", "--address", fake.address, "--follow"]) == 0
    said = capfd.readouterr()
    assert "not submitted again" in said.out
    assert LOG in said.out


def test_a_submission_whose_answer_was_lost_is_found(fake: Fake, folder: Path):
    client, job = connect(fake.address), drafted(folder)
    fake.answers_submissions = False
    assert submit(client, job) == (job.name, False)
    fake.away = 1
    with pytest.raises(AwayError, match="no answer"):
        submit(client, drafted(folder, "seed=1"))


def test_a_log_is_whole_whatever_happens_to_the_connection(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch):
    client = connect(fake.address)
    name, _ = submit(client, drafted(folder))
    fake.cuts = [0, 150, 149, 6000]
    written, told = list[str](), list[str]()

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 20:
            fake.away = 5

    ended = follow(client, name, write, told.append)
    assert "".join(written) == LOG
    assert ended is not None
    assert ended.status == "SUCCEEDED"
    waits, backs = [t for t in told if "waiting" in t], [t for t in told if "is back" in t]
    assert len(waits) == len(backs) == len(told) / 2
    assert 2 <= len(waits) <= 4  # of consecutive failures the first is told
    fake.cuts, fake.goes_silent = [0, 300], True
    monkeypatch.setattr(jobs, "SILENCE_SECONDS", 0.2)
    written.clear()
    told.clear()
    follow(client, name, written.append, told.append)
    assert "".join(written) == LOG
    assert told == []


def test_the_end_of_a_job_is_told_though_its_log_cannot_be_read(fake: Fake, folder: Path):
    client = connect(fake.address)
    name, _ = submit(client, drafted(folder))
    fake.end("FAILED")
    fake.cuts, written, told = [300] * 10, list[str](), list[str]()
    ended = follow(client, name, written.append, told.append)
    assert "".join(written) == LOG[:300]
    assert ended is not None
    assert ended.status == "FAILED"
    assert "cannot be read" in told[-1]


def test_a_cluster_that_was_started_anew_is_told_from_one_that_is_away(fake: Fake, folder: Path, capfd, monkeypatch):
    client = connect(fake.address)
    name, _ = submit(client, drafted(folder))
    with pytest.raises(UnknownJobError, match="knows no job other"):
        follow(client, "other", print, print)
    fake.cuts = [100]

    def forget(_: str) -> None:
        fake.jobs.clear()

    assert follow(client, name, forget, print) is None
    submit(client, drafted(folder))
    fake.cuts, written = [100], list[str]()

    def renew(_: str) -> None:
        fake.jobs[name]["start_time"] += 1

    follow(client, name, written.append, renew)
    assert "".join(written) == LOG[:100] + LOG  # of two jobs

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupt)
    assert main(["jobs", "follow", name, "--address", fake.address]) == 1
    assert f"the job goes on; lmu-dist jobs follow {name}" in capfd.readouterr().err


def test_jobs_are_listed_and_stopped(fake: Fake, folder: Path, capfd: pytest.CaptureFixture[str]):
    name, _ = submit(connect(fake.address), drafted(folder))
    assert main(["jobs", "stop", name, "--address", fake.address]) == 0
    assert main(["jobs", "list", "--address", fake.address]) == 0
    assert capfd.readouterr().out.count(f"{name}") == 2
    assert main(["jobs", "list", "--json", "--address", fake.address]) == 0
    [row] = json.loads(capfd.readouterr().out)
    assert (row["id"], row["status"], row["config"], row["experiment"]) == (name, "STOPPED", "job.yaml", "tests")


def test_progress_in_a_log_has_a_line_when_it_says_more_and_now_and_then(monkeypatch, capfd: pytest.CaptureFixture[str]):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with show.bars() as bars:
        for i in range(40):  # eighty seconds
            bars.show("ladder", i // 20, 16, f"{i // 20} of 16 cells ended")
    lines = [line.strip() for line in capfd.readouterr().err.splitlines()]
    assert lines == ["ladder 0% 0 of 16 cells ended"] * 2 + ["ladder 6% 1 of 16 cells ended"] * 2


@pytest.fixture
def head() -> Iterator[str]:
    """A Ray head with a dashboard and a token, on ports of its own, as `ray start` gives; the dashboard's address."""
    ports = [_free_port() for _ in range(4)]
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    scratch = tempfile.mkdtemp(prefix="lmu")  # Ray's sockets bear no long paths
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_API_SERVER_ADDRESS")}
    environment["LMU_DIST_HOME"] = scratch
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--temp-dir={scratch}",
            *options,
        ],
        env=environment,
        cwd=scratch,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        deadline = time.monotonic() + 60
        while not _listens(ports[1]) or not _listens(ports[2]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield address
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_a_job_runs_on_a_cluster_with_the_code_that_was_sent(head: str, folder: Path, monkeypatch, capfd):
    shutil.copytree(ROOT / "lmu_dist", folder / "lmu_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "lmu_dist" / "__init__.py", "a") as file:
        file.write('print("the code that was sent")\n')
    assert main(["submit", "job.yaml", "--address", head]) == 0
    for token, answer in (("f" * 64, "refuses the token"), ("", "there is no token")):
        refused = subprocess.run(
            [sys.executable, "-m", "lmu_dist.cli", "jobs", "list", "--address", head],
            env=os.environ | {"RAY_AUTH_TOKEN": token, "HOME": str(folder)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert answer in refused.stderr
        assert "RAY_AUTH_TOKEN" in refused.stderr
    assert main(["submit", "job.yaml", "--address", head, "--follow"]) == 0
    said = capfd.readouterr()
    assert "not submitted again" in said.out
    assert "the code that was sent" in said.out
    assert "complete    lmu-3k-25.6k-s0-" in said.out
    assert main(["jobs", "list", "--json", "--address", head]) == 0
    [row] = json.loads(capfd.readouterr().out)
    assert (row["status"], row["experiment"]) == ("SUCCEEDED", "tests")
