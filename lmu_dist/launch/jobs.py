"""Jobs of a Ray cluster elsewhere: a Draft in, a job that runs there, is followed, listed and stopped.

The only file that knows the Jobs API. Called by `lmu-dist submit` and `lmu-dist jobs`; logs and what is said on the way go to
listeners.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from lmu_dist.config import ConfigError, FailedError
from lmu_dist.launch.submission import Draft

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as `ray job` reads them
REQUEST_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
SILENCE_SECONDS = 60.0  # of a log, after which its connection is made anew: it may be dead
PAUSES_SECONDS = (1.0, 30.0)  # between two attempts to reach a cluster that is away: at first, at most
MOST_UNREAD = 5  # attempts to read the log of a job that has ended
Listener = Callable[[str], None]

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):  # which tell of every upload and close
    logging.getLogger(_name).setLevel(logging.ERROR)


class AwayError(FailedError):
    """The cluster does not answer for now."""


class UnknownJobError(ConfigError):
    """The cluster knows no such job."""


@dataclass(frozen=True)
class Job:
    """A job of a cluster, as a row of a table. Times are UTC."""

    id: str
    status: str  # PENDING RUNNING SUCCEEDED FAILED STOPPED
    command: str
    experiment: str
    config: str
    git_commit: str
    git_dirty: bool
    started: str
    seconds: float | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return JobStatus(self.status).is_terminal()


class Client(JobSubmissionClient):
    """Ray's client, with errors in one line and an end to waiting: of its own it waits for ever in a network that is cut."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            # The upload of a package is answered after Ray has stored it.
            seconds = UPLOAD_SECONDS if method == "PUT" else REQUEST_SECONDS
            response = super()._do_request(method, endpoint, timeout=(REQUEST_SECONDS, seconds), **options)
        except AuthenticationError as e:
            raise ConfigError(f"{self.get_address()} refuses the token; set RAY_AUTH_TOKEN to that of the cluster") from e
        except OSError as e:  # of requests, all of them
            raise AwayError(f"no answer from {self.get_address()}: {type(e).__name__}") from e
        if response.status_code == 404 and endpoint.startswith("/api/jobs/"):
            name = endpoint.split("/")[3]
            raise UnknownJobError(f"{self.get_address()} knows no job {name}; lmu-dist jobs list names those it knows")
        if response.status_code >= 400 and response.status_code != 404:
            kind = AwayError if response.status_code >= 500 else FailedError
            last = (response.text.strip().splitlines() or [""])[-1]  # of a traceback
            raise kind(f"{self.get_address()} answers {response.status_code}: {last[:300]}")
        return response


def connect(address: str | None) -> Client:
    """A client of the cluster whose dashboard has this address. Raises ConfigError if it cannot be worked with."""
    address = address or next(filter(None, map(os.environ.get, ADDRESSES)), None)
    if address is None or urlsplit(address).scheme not in ("http", "https"):
        given = f"not {address}" if address else "or set RAY_API_SERVER_ADDRESS"
        raise ConfigError(f"give the address of the cluster's dashboard, --address http://HEAD:8265, {given}")
    if "@" in urlsplit(address).netloc:
        raise ConfigError("--address holds credentials, which everybody who lists processes could read; take them out of it")
    os.environ[ADDRESSES[0]] = address  # which Ray lets go before what it is given
    try:
        client = Client(address)
    except ConfigError:
        raise
    except AuthenticationError as e:  # before anything was asked
        raise ConfigError(
            "there is no token; set RAY_AUTH_TOKEN to that of the cluster, or RAY_AUTH_MODE=disabled if it has none"
        ) from e
    except AwayError as e:
        raise ConfigError(f"{e}; start the cluster, or give the address of its dashboard") from e
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        raise ConfigError(f"{address} is no dashboard of Ray: {e or type(e).__name__}") from e
    theirs, ours = str(client._server_ray_version), ray.__version__
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ConfigError(
            f"{address} runs Ray {theirs} and this is for Ray {ours}; install ray=={ours} on its nodes, or here {theirs}"
        )
    return client


def submit(client: Client, drafted: Draft) -> tuple[str, bool]:
    """(id, whether it is new). A job with the same content that has not ended is not submitted again; one that has, is, under
    the next number: what it had done is on record and is skipped.
    """
    known = {job.submission_id: job for job in client.list_jobs() if _is_of(job, drafted.name)}
    for name, job in known.items():
        if not job.status.is_terminal():
            return str(name), False
    last = max((int(str(name)[len(drafted.name) + 1 :] or 1) for name in known), default=0)
    new = f"{drafted.name}-{last + 1}" if last else drafted.name
    try:
        client.submit_job(
            entrypoint=drafted.entrypoint,
            submission_id=new,
            runtime_env={
                "working_dir": str(drafted.package.folder),
                "excludes": list(drafted.package.excludes),
                "env_vars": drafted.environment,
            },
            metadata=dict(drafted.metadata),
        )
    except AwayError:
        # Perhaps it arrived and only the answer was lost; or another took the name a moment before.
        if new not in {job.submission_id for job in client.list_jobs()}:
            raise
        return new, False
    return new, True


def _is_of(job: JobDetails, name: str) -> bool:
    return job.type is JobType.SUBMISSION and re.fullmatch(re.escape(name) + r"(-\d+)?", job.submission_id or "") is not None


def listed(client: Client) -> list[Job]:
    """All jobs the cluster knows, by whomever, latest first."""
    jobs = [job for job in client.list_jobs() if job.type is JobType.SUBMISSION]
    return [_row(job) for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)]


def stop(client: Client, name: str, pause_seconds: float = 1.0) -> Job:
    """Interrupts a job as Ctrl-C would, waits for its end (Ray kills it after a minute), and returns it."""
    client.stop_job(name)
    while not (job := _row(client.get_job_info(name))).ended:
        time.sleep(pause_seconds)
    return job


def follow(client: Client, name: str, write: Listener, tell: Listener) -> Job | None:
    """Writes the log of a job from its beginning to its end, every character once, however often the connection is lost.

    Tells when the cluster goes away and when it is back. Returns the job, or None if the cluster came back without it.
    Raises UnknownJobError if it never had it.
    """
    log, known, unread, pause = _Log(client.get_address(), write, tell), False, 0, PAUSES_SECONDS[0]
    while True:
        job, ended = None, False
        try:
            job = client.get_job_info(name)
            known, ended = True, job.status.is_terminal()
            log.rewind(job.start_time)
            asyncio.run(_tail(client, name, log))
            job = client.get_job_info(name)
            if log.whole and job.status.is_terminal():
                return _row(job)
            pause = PAUSES_SECONDS[0]
        except UnknownJobError:
            if not known:
                raise
            return None
        except AwayError as e:
            unread += ended
            if job is not None and unread == MOST_UNREAD:  # as when the node with the log is gone
                tell(f"{e}; the rest of it cannot be read")
                return _row(job)
            pause = min(2 * pause, PAUSES_SECONDS[1]) if log.away else PAUSES_SECONDS[0]
            log.lost(e)
        time.sleep(pause)


class _Log:
    """A log that is read from its start again and again, and what was written of it."""

    def __init__(self, source: str, write: Listener, tell: Listener) -> None:
        self._source, self._write, self._tell = source, write, tell
        self._began: int | None = None
        self._written, self._read = 0, 0
        self.away, self.whole = False, False  # whether its source is silent; whether it was read to its end

    def rewind(self, began: int | None) -> None:
        """Prepares for the log's start. A job of the same name that began at another time is another job."""
        if began != self._began:
            self._began, self._written = began, 0
        self._read, self.whole = 0, False

    def add(self, text: str) -> None:
        """Writes what is new of the next piece."""
        self._back()
        new = text[max(0, self._written - self._read) :]
        self._read += len(text)
        if new:
            self._write(new)
            self._written += len(new)

    def end(self) -> None:
        """Takes note that nothing follows."""
        self._back()
        self.whole = True

    def lost(self, error: Exception) -> None:
        """Says once that the log broke off."""
        if not self.away:
            self._tell(f"{error}; waiting until the cluster answers")
        self.away = True

    def _back(self) -> None:
        if self.away:
            self._tell(f"{self._source} is back")
        self.away = False


async def _tail(client: Client, name: str, log: _Log) -> None:
    """Reads a log until it ends or falls silent. Raises AwayError."""
    try:
        async with aclosing(client.tail_job_logs(name)) as pieces:  # pyright: ignore[reportArgumentType]
            while True:
                log.add(await asyncio.wait_for(anext(pieces), SILENCE_SECONDS))
    except StopAsyncIteration:
        log.end()
    except TimeoutError:
        pass
    except (OSError, RuntimeError, aiohttp.ClientError) as e:
        raise AwayError(f"the log of {name} broke off: {e or type(e).__name__}") from e


def _row(job: JobDetails) -> Job:
    facts = job.metadata or {}
    until = job.end_time or time.time() * 1000
    return Job(
        id=job.submission_id or "",
        status=str(job.status),
        command=facts.get("command", ""),
        experiment=facts.get("experiment", ""),
        config=facts.get("config", ""),
        git_commit=facts.get("git_commit", ""),
        git_dirty=facts.get("git_dirty") == "true",
        started=datetime.fromtimestamp(job.start_time / 1000, UTC).isoformat(timespec="seconds") if job.start_time else "",
        seconds=(until - job.start_time) / 1000 if job.start_time else None,
        message=(job.message or "").partition("\n")[0] if job.status in (JobStatus.FAILED, JobStatus.STOPPED) else "",
    )
