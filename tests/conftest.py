"""What all tests share: a corpus, MLflow stores, an S3 bucket, simulated machines; how three processes divide the tests."""

import gc
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import typecheck

typecheck.install()
# Set before Ray, torch or DeepSpeed is imported, so that the tests do not depend on the machine's settings.
os.environ["DS_ACCELERATOR"] = "cpu"
# Both cores are busy: a second thread makes no test faster, and the first one waits for it. Threads of OpenMP would do so in a
# loop, which takes the cores from the other processes of the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 would starve its workers beside the other tests
# The modules of tests/launch that start no Ray, and that of families, whose commands start their own. All others share one
# process, because two Rays need more than two cores.
APART_FROM_RAY = (
    "families",
    "cell",
    "claim",
    "clean",
    "cluster",
    "dispatcher",
    "finished",
    "imports",
    "jobs",
    "metrics_logger",
    "restored",
    "waves",
    "worker",
    "work_queue",
)
EARLY = ("tests/launch/test_families", "tests/train/", "tests/test_study")


def group_of(nodeid: str) -> str:
    """The tests that `pytest -n 3` runs in one process: those that start Ray, those of the report, those of each other file."""
    path = nodeid.split("::", 1)[0]
    folder, _, module = path.rpartition("/test_")
    if folder == "tests/launch" and module.removesuffix(".py") not in APART_FROM_RAY:
        return "Ray"
    return folder if folder == "tests/report" else path  # so that the report is written once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that start Ray first: they take longest, and the other processes run the rest meanwhile.

    Of these, the ones that share a Ray come last: after it has started, this process can join no other one. Of the rest, the
    tests that take longest come first: at the end all processes have a share of what is left.
    """

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        group = group_of(item.nodeid)
        return (
            group != "Ray",
            not group.startswith(EARLY),
            "local_ray" in getattr(item, "fixturenames", ()),
        )

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Looks for no unreachable objects meanwhile, and later not among those of imports, where a search takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divides the tests between the processes of `pytest -n 3` by their groups, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def write_corpus(folder: Path, n_documents: int = 400, n_files: int = 4, seed: int = 0) -> list[Path]:
    """Writes a corpus of random words as JSON lines; the same words for the same seed. Returns the paths of its files."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(n_files):
        path = folder / f"part-{i}.jsonl"
        documents = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(n_documents // n_files))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        paths.append(path)
    return paths


@pytest.fixture(autouse=True)
def _no_user_families(monkeypatch: pytest.MonkeyPatch):
    """Each test starts as a new process does, without the families in users' files that other tests have registered."""
    from lmu_dist.models import registry  # not at the top, where it would be imported before its types can be checked

    monkeypatch.setattr(registry, "_user_families", {})


@pytest.fixture(scope="session", autouse=True)
def _no_waits_for_the_disk() -> Iterator[None]:
    """SQLite does not wait for the disk, as MLflow makes it do seven times a run: only a loss of power could show it."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def set_pragma(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", set_pragma)
    yield
    event.remove(Engine, "connect", set_pragma)


@pytest.fixture(scope="session", autouse=True)
def _new_databases_are_copies() -> Iterator[None]:
    """A new SQLite file of MLflow is a copy of the first one: its tables, and all their migrations, take a second."""
    if "mlflow" not in sys.modules:  # the tests at hand do not need it, and to import it takes longer
        yield
        return
    from mlflow.store.db import utils
    from sqlalchemy.engine import Engine

    made, lock = sqlite3.connect(":memory:", check_same_thread=False), threading.Lock()
    create = utils._initialize_tables

    def is_empty(database: sqlite3.Connection) -> bool:
        return not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def copy(engine: Engine) -> None:
        path = engine.url.database if engine.url.drivername.startswith("sqlite") else None
        if not path:
            create(engine)
            return
        with lock, closing(sqlite3.connect(path)) as database:
            if not is_empty(database):
                create(engine)
            elif is_empty(made):
                create(engine)
                database.backup(made)
            else:
                made.backup(database)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copy)
        yield
    made.close()


@pytest.fixture(scope="session")
def corpus_glob(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return str(folder / "*.jsonl")


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on an S3 server on loopback. The clients' settings are in the environment, also of new processes."""
    from lmu_dist.launch.local_commands import free_port

    port = free_port()
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**settings, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.2)
        urllib.request.urlopen(urllib.request.Request(f"{url}/studies", method="PUT"), timeout=30).close()  # creates the bucket
        yield "s3://studies"
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that simulates a switch to another machine: it changes the user's cache, where local state is kept."""

    def switch_to(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    switch_to("first")
    return switch_to
