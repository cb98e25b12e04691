"""Submitting, following, listing and stopping jobs, against a fake Jobs API that loses connections. Without Ray."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import ray
from aiohttp import web
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from lmu_dist import show
from lmu_dist.cli import main
from lmu_dist.config import load
from lmu_dist.launch import jobs, submission
from lmu_dist.launch.jobs import ClusterUnavailableError, UnknownJobError, connect, follow, submit
from lmu_dist.launch.submission import JobSpec, make_job_spec

# Ray raises warnings, and keeps sockets open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
LOG = "".join(f"line {i}: übung\n" for i in range(400)) + "no line break at the end"


class Fake:
    """A fake of the Jobs API on loopback, in a background thread, which can drop connections and forget its jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.bodies: list[str] = []  # of the submissions
        self.cuts: list[int] = []  # characters after which a connection to the log is dropped, one per connection
        self.n_dropped = 0  # requests to drop from now on
        self.ray_version, self.answers_submissions, self.status_after_log = ray.__version__, True, "SUCCEEDED"
        self.start_time, self.stalls = 1_700_000_000_000, False
        self.address = ""

    def end(self, status: str = "SUCCEEDED") -> None:
        for job in self.jobs.values():
            job["status"] = status

    @web.middleware
    async def _middle(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.n_dropped:
            self.n_dropped -= 1
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
        self.jobs[wanted["submission_id"]] = wanted | {"status": "RUNNING", "start_time": self.start_time, "type": "SUBMISSION"}
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
        if cut < len(LOG) and self.stalls:
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
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # also undoes what connect sets
    monkeypatch.setattr(jobs, "RETRY_SECONDS", (0.01, 0.05))


def job_spec(folder: Path, *overrides: str) -> JobSpec:
    return make_job_spec(load(folder / "job.yaml", overrides), folder / "job.yaml", overrides, None, folder)


def test_package_lists_the_files_that_ray_packs(folder: Path, tmp_path: Path):
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
    package = job_spec(folder).package
    target = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    with ZipFile(target) as packed:
        assert {entry.filename: entry.file_size for entry in packed.infolist() if not entry.is_dir()} == package.files
    assert package.left_out.keys() == {"runs/", "big.bin", "kept/a.bin", "kept/b.txt", "corpus/part-3.jsonl"}
    assert package.left_out["runs/"] == len("runs/x/deep.bin")


def test_files_ignored_by_a_parent_gitignore_are_not_sent(folder: Path, tmp_path: Path):
    subprocess.run(["git", "init", "-q", folder.parent], check=True)
    (folder.parent / ".gitignore").write_text(".env\nweights \\[1\\]*\n")
    for name in (".env", "weights [1].bin", "weights.txt"):
        (folder / name).write_text(name)
    package = job_spec(folder).package
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=list(package.excludes))
    with ZipFile(tmp_path / "package.zip") as packed:
        assert {entry.filename for entry in packed.infolist() if not entry.is_dir()} == set(package.files)
    assert package.left_out.keys() == {".env", "weights [1].bin"}
    assert "weights.txt" in package.files


def test_results_are_not_sent_without_git(folder: Path, tmp_path: Path):
    results = ["runs/tests/a/record.json", "other/owner_id", "other/tests/b.jsonl", "page/report.html", "page/runs.csv"]
    results += ["mlflow.db", "mlartifacts/1/x", "env/pyvenv.cfg", "env/lib/x.py", "model/model.safetensors"]
    inputs = {"model/tokenizer.json", "src/data/run.py"}
    for name in (*results, *inputs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    package = job_spec(folder, "storage=runs").package
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=list(package.excludes))
    with ZipFile(tmp_path / "package.zip") as packed:
        assert {entry.filename for entry in packed.infolist() if not entry.is_dir()} == set(package.files)
    assert set(package.files) == {"job.yaml", *inputs, *(f"corpus/part-{i}.jsonl" for i in range(4))}
    left_out = {"runs/", "other/", "page/", "env/", "mlartifacts/", "mlflow.db", "model/model.safetensors"}
    assert package.left_out.keys() == left_out


def test_local_mlflow_uri_is_not_sent(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for uri in ("http://127.0.0.1:5000", "http://localhost:5000", f"sqlite:///{folder}/mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        job = job_spec(folder)
        assert "MLFLOW_TRACKING_URI" not in job.environment
        assert any("uses that of the cluster" in note for note in job.notes)
    name = job.name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert job_spec(folder).name != name


def test_job_name_depends_only_on_the_content(folder: Path):
    (folder / ".gitignore").write_text("runs/\n")
    name = job_spec(folder).name
    assert name.startswith("train-tests-")
    (folder / "runs").mkdir()
    (folder / "runs" / "losses").write_text("1")
    os.utime(folder / "job.yaml", (1, 1))
    assert job_spec(folder).name == name
    assert job_spec(folder, "seed=1").name != name
    (folder / "more.py").write_text("")
    assert job_spec(folder).name != name


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
        ("", ["job.yaml", "model.family=../own.py:Own"], "own.py lies outside the submitted folder"),
        ("echo own.py > .gitignore", ["job.yaml", "model.family=own.py:Own"], "own.py would not be sent"),
        ("head -c 300000 /dev/zero > large.bin", ["job.yaml"], "the largest are large.bin"),
        ("", ["job.yaml", "storage=../../runs"], "storage: ../../runs leads out of the folder"),
        ("", ["job.yaml"], "give the address of the cluster's dashboard"),
        ("", ["job.yaml", "--address", "10.0.0.1:6379"], "not 10.0.0.1:6379"),
        ("", ["job.yaml", "--address", "http://me:secret@head:8265"], "--address holds credentials"),
        ("", ["job.yaml", "--address", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1"),
    ],
)
def test_invalid_submission_is_an_error_of_one_line(change: str, arguments, message: str, folder: Path, monkeypatch, capfd):
    shutil.copy(folder / "job.yaml", folder.parent / "outside.yaml")
    for own in (folder.parent / "own.py", folder / "own.py"):
        shutil.copy(ROOT / "examples" / "gated_linear_attention.py", own)
        own.write_text(own.read_text().replace("class GatedLinearAttention", "class Own"))
    monkeypatch.setattr(submission, "GCS_STORAGE_MAX_SIZE", 300_000)
    subprocess.run(change, shell=True, check=True)
    if "address" not in message and "--address" not in arguments:
        arguments = [*arguments, "--address", "http://127.0.0.1:1"]
    assert main(["submit", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "secret" not in error
    assert len([line for line in error.splitlines() if line.startswith("lmu-dist:")]) == 1


def test_other_ray_versions_and_other_servers_are_refused(fake: Fake, capfd: pytest.CaptureFixture[str]):
    fake.ray_version = "2.40.0"
    assert main(["jobs", "list", "--address", fake.address]) == 2
    assert "runs Ray 2.40.0" in capfd.readouterr().err
    assert main(["jobs", "list", "--address", f"{fake.address}/elsewhere"]) == 2
    assert "is not a Ray dashboard" in capfd.readouterr().err


def test_overrides_survive_the_shell(folder: Path):
    typed = ["data.text_field=a 'b' \"c\" $HOME `id` \\ ; *", "seed=3"]
    print_arguments = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    entrypoint = job_spec(folder, *typed).entrypoint.replace("python -m lmu_dist.cli", print_arguments)
    out = subprocess.run(entrypoint, shell=True, check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == ["train", "job.yaml", *typed]


def test_secrets_are_not_sent(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example")
    assert main(["submit", "job.yaml", "--address", fake.address]) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert main(["submit", "job.yaml", "--address", fake.address]) == 0
    output = "".join(capfd.readouterr())
    assert "AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD" in output
    assert "hunter2" not in output + "".join(fake.bodies)
    [body] = map(json.loads, fake.bodies)
    assert body["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    assert body["metadata"]["experiment"] == "tests"
    assert "entrypoint_num_cpus" not in body  # so that Ray runs the driver on the head


def test_running_job_is_not_submitted_again(fake: Fake, folder: Path, capfd: pytest.CaptureFixture[str]):
    client, job = connect(fake.address), job_spec(folder)
    assert submit(client, job) == (job.name, True)
    assert submit(client, job) == (job.name, False)
    for status, number in (("SUCCEEDED", 2), ("FAILED", 3), ("STOPPED", 4)):
        fake.end(status)
        assert submit(client, job) == (f"{job.name}-{number}", True)
    assert submit(client, job) == (f"{job.name}-4", False)
    fake.jobs.clear()  # like a new cluster
    assert submit(client, job) == (job.name, True)
    assert main(["submit", "job.yaml", "--address", fake.address, "--follow"]) == 0
    captured = capfd.readouterr()
    assert "not submitted again" in captured.out
    assert LOG in captured.out


def test_submission_whose_answer_was_lost_is_found(fake: Fake, folder: Path):
    client, job = connect(fake.address), job_spec(folder)
    fake.answers_submissions = False
    assert submit(client, job) == (job.name, False)
    fake.n_dropped = 1
    with pytest.raises(ClusterUnavailableError, match="no answer"):
        submit(client, job_spec(folder, "seed=1"))


def test_followed_log_is_complete_after_lost_connections(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch):
    client = connect(fake.address)
    name, _ = submit(client, job_spec(folder))
    fake.cuts = [0, 150, 149, 6000]
    written, messages = list[str](), list[str]()

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 20:
            fake.n_dropped = 5

    ended = follow(client, name, write, messages.append)
    assert "".join(written) == LOG
    assert ended is not None
    assert ended.status == "SUCCEEDED"
    waiting, back = [m for m in messages if "waiting" in m], [m for m in messages if "answers again" in m]
    assert len(waiting) == len(back) == len(messages) / 2
    assert 2 <= len(waiting) <= 4  # only the first of consecutive failures is reported
    fake.cuts, fake.stalls = [0, 300], True
    monkeypatch.setattr(jobs, "LOG_IDLE_SECONDS", 0.2)
    written.clear()
    messages.clear()
    follow(client, name, written.append, messages.append)
    assert "".join(written) == LOG
    assert messages == []


def test_end_of_a_job_is_reported_without_its_log(fake: Fake, folder: Path):
    client = connect(fake.address)
    name, _ = submit(client, job_spec(folder))
    fake.end("FAILED")
    fake.cuts, written, messages = [300] * 10, list[str](), list[str]()
    ended = follow(client, name, written.append, messages.append)
    assert "".join(written) == LOG[:300]
    assert ended is not None
    assert ended.status == "FAILED"
    assert "cannot be read" in messages[-1]


def test_restarted_cluster_is_distinguished_from_an_unreachable_one(fake: Fake, folder: Path, capfd, monkeypatch):
    client = connect(fake.address)
    name, _ = submit(client, job_spec(folder))
    with pytest.raises(UnknownJobError, match="has no job other"):
        follow(client, "other", print, print)
    fake.cuts = [100]

    def forget(_: str) -> None:
        fake.jobs.clear()

    assert follow(client, name, forget, print) is None
    submit(client, job_spec(folder))
    fake.cuts, written = [100], list[str]()

    def renew(_: str) -> None:
        fake.jobs[name]["start_time"] += 1

    follow(client, name, written.append, renew)
    assert "".join(written) == LOG[:100] + LOG  # the logs of two jobs

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupt)
    assert main(["jobs", "follow", name, "--address", fake.address]) == 1
    assert f"the job keeps running; to follow it again: lmu-dist jobs follow {name}" in capfd.readouterr().err


def test_jobs_list_and_stop(fake: Fake, folder: Path, capfd: pytest.CaptureFixture[str]):
    name, _ = submit(connect(fake.address), job_spec(folder))
    assert main(["jobs", "stop", name, "--address", fake.address]) == 0
    assert main(["jobs", "list", "--address", fake.address]) == 0
    assert capfd.readouterr().out.count(f"{name}") == 2
    assert main(["jobs", "list", "--json", "--address", fake.address]) == 0
    [row] = json.loads(capfd.readouterr().out)
    assert (row["id"], row["status"], row["config"], row["experiment"]) == (name, "STOPPED", "job.yaml", "tests")


def test_progress_in_a_log_file_has_a_line_per_change_and_per_minute(monkeypatch, capfd: pytest.CaptureFixture[str]):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with show.progress_bars() as bars:
        for i in range(40):  # eighty seconds
            bars.update("ladder", i // 20, 16, f"{i // 20} of 16 cells ended")
    lines = [line.strip() for line in capfd.readouterr().err.splitlines()]
    assert lines == ["ladder 0% 0 of 16 cells ended"] * 2 + ["ladder 6% 1 of 16 cells ended"] * 2
