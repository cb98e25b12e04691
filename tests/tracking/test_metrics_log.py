"""The metrics log on a disk that is full, and with damaged lines: no gap, nothing that cannot be opened again."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmu_dist.config import FailedError
from lmu_dist.tracking import metrics_log as module
from lmu_dist.tracking.metrics_log import MetricsLog


class FullDisk:
    """Replaces `open` of the metrics log: while `full`, a write puts half of its bytes on the disk and fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, can_truncate: bool = True) -> None:
        self.full, self.can_truncate = False, can_truncate
        monkeypatch.setattr(module, "open", self._open, raising=False)

    def _open(self, path: Path, mode: str, **options: int):
        file = open(path, mode, **options)  # noqa: SIM115 - the caller closes it
        if not self.full or "+" not in mode:
            return file
        return HalfWriter(file, self.can_truncate)


class HalfWriter:
    def __init__(self, file, can_truncate: bool) -> None:
        self.file, self.can_truncate, self.half_written = file, can_truncate, False

    def write(self, data: memoryview) -> int:
        if self.half_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.half_written = True
        return self.file.write(data[: len(data) // 2])

    def truncate(self, size: int) -> None:
        if self.half_written and not self.can_truncate:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.file.truncate(size)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def losses(log: MetricsLog) -> list[tuple[int, float]]:
    return [(entry["step"], entry["values"]["loss"]) for _, entry in log.pending() if entry["kind"] == "metrics"]


@pytest.mark.parametrize("can_truncate", [True, False])
def test_full_disk_leaves_a_log_without_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_truncate: bool):
    disk, log = FullDisk(monkeypatch, can_truncate), MetricsLog(tmp_path, "r")
    log.start_attempt("a", {})
    for step in range(3):
        log.log_metrics(step, {"loss": float(step)})
    log.flush()  # before the checkpoint of step 3
    disk.full = True
    with pytest.raises(FailedError, match=f"the disk is full: .*{tmp_path}.*; free some space"):
        log.log_metrics(3, {"loss": 3.0})
    disk.full = False
    for refuse in (log.flush, log.check, lambda: log.log_metrics(4, {"loss": 4.0})):  # or step 3 would be missing for good
        with pytest.raises(FailedError, match="the disk is full"):
            refuse()
    log.set_tags({"lmu.status": "failed"})
    for again in (log, MetricsLog(tmp_path, "r")):  # in the same process, and in one that resumes from the checkpoint
        again.start_attempt("b", {})
        for step in range(3, 6):
            again.log_metrics(step, {"loss": float(step)})
        again.flush()
    assert losses(again) == [(step, float(step)) for step in range(6)]
    assert all(json.loads(line) for line in (tmp_path / "metrics_log.jsonl").read_bytes().splitlines())
    assert again.attempts == 2
    assert again.notes() == []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "torn and continued": lambda line: line[: len(line) // 2] + b'{"kind": "start"}\n',
    "zeros": lambda line: b"\0" * (len(line) - 1) + b"\n",
    "not UTF-8": lambda line: line.replace(b"loss", b"\xff\xfe\xfd\xfc"),
    "another field": lambda line: line.replace(b"values", b"valuds"),
    "another kind": lambda line: line.replace(b"metrics", b"metrixs"),
    "no object": lambda line: b"[1]\n",
    "no number": lambda line: line.replace(b"1.0}", b'"1"}'),
    "empty": lambda line: b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_line_is_skipped_and_counted(tmp_path: Path, damage: Callable[[bytes], bytes]):
    log = MetricsLog(tmp_path, "r")
    for step in range(4):
        log.log_metrics(step, {"loss": float(step)})
    path = tmp_path / "metrics_log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert damage(lines[1]) != lines[1]
    path.write_bytes(b"".join([lines[0], damage(lines[1]), *lines[2:], b'{"kind": "torn']))
    again = MetricsLog(tmp_path, "r")
    again.log_metrics(4, {"loss": 4.0})
    assert losses(again) == [(0, 0.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    [note] = again.notes()
    assert note.startswith(f"1 line is damaged in {path}")
    assert path.read_bytes().endswith(b'{"loss": 4.0}}\n')


@pytest.mark.parametrize("content", ["", "x", "-3", "7", "1000000"])
def test_damaged_upload_position_uploads_all_entries_again(tmp_path: Path, content: str):
    log = MetricsLog(tmp_path, "r")
    log.log_metrics(0, {"loss": 0.0})
    [(position, _)] = log.pending()
    log.mark_uploaded(position)
    assert not list(MetricsLog(tmp_path, "r").pending())
    (tmp_path / "metrics_log.uploaded.r").write_text(content)
    assert losses(MetricsLog(tmp_path, "r")) == [(0, 0.0)]


def test_a_call_that_is_repeated_counts_one_attempt(tmp_path: Path):
    log = MetricsLog(tmp_path, "r")
    log.start_attempt("first", {"lmu.n_workers": 2})
    log.start_attempt("first", {"lmu.n_workers": 2})  # the actor died before it answered, and Ray repeats the call
    again = MetricsLog(tmp_path, "r")
    again.start_attempt("first", {"lmu.n_workers": 2})
    again.start_attempt("second", {})
    values = [entry["values"] for _, entry in again.pending()]
    assert [tags["lmu.attempt"] for tags in values] == ["1", "1", "1", "2"]
    assert MetricsLog(tmp_path, "r").attempts == 2


def test_opening_a_log_does_not_cut_what_its_writer_is_writing(tmp_path: Path):
    writer = MetricsLog(tmp_path, "r")
    writer.log_metrics(0, {"loss": 0.0})
    path = tmp_path / "metrics_log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "met')  # the writer is in the middle of a line
    assert losses(MetricsLog(tmp_path, "r")) == [(0, 0.0)]
    assert path.read_bytes() == whole + b'{"kind": "met'


def test_steps_in_any_order_are_each_logged_once(tmp_path: Path):
    # Of a recorder that was killed Ray repeats the calls that were not answered, after calls that came later.
    log = MetricsLog(tmp_path, "r")
    for step in (0, 3, 1, 2, 1, 3):
        log.log_metrics(step, {"loss": float(step)})
    assert losses(log) == [(0, 0.0), (3, 3.0), (1, 1.0), (2, 2.0)]
    again = MetricsLog(tmp_path, "r")  # the process that was started again
    for step in (2, 4):
        again.log_metrics(step, {"loss": float(step)})
    assert [step for step, _ in losses(again)] == [0, 3, 1, 2, 4]


def test_a_point_has_the_time_at_which_it_was_measured(tmp_path: Path):
    log = MetricsLog(tmp_path, "run")
    before = int(time.time() * 1000)
    log.log_metrics(0, {"loss": 1.0}, 1234)
    log.log_metrics(1, {"loss": 1.0})
    given, now = (entry["time_ms"] for _, entry in log.pending() if entry["kind"] == "metrics")
    assert given == 1234
    assert before <= now <= time.time() * 1000
