"""Submits, follows, lists and stops jobs on a remote Ray cluster, through Ray's Jobs API; no other module uses that API.

Called by `lmu-dist submit` and `lmu-dist jobs`. Log text and messages go to callbacks.
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
from typing import TYPE_CHECKING, Any

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from lmu_dist.config import ConfigError, FailedError
from lmu_dist.launch.address import ADDRESSES, dashboard_address

if TYPE_CHECKING:  # it imports torch and MLflow, which commands for jobs that are on the cluster do without
    from lmu_dist.launch.submission import JobSpec

REQUEST_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
LOG_IDLE_SECONDS = 60.0  # without log text, after which the log is read over a new connection: the old one may be dead
RETRY_SECONDS = (1.0, 30.0)  # the first and the longest pause between two attempts to reach the cluster
MAX_LOG_ATTEMPTS = 5  # to read the log of a job that has ended

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):  # they log every upload
    logging.getLogger(_name).setLevel(logging.ERROR)


class ClusterUnavailableError(FailedError):
    """The cluster does not answer; a retry may succeed."""


class UnknownJobError(ConfigError):
    """The cluster has no job with this id."""


@dataclass(frozen=True)
class ClusterJob:
    """A job of a cluster, as a row of the table of `lmu-dist jobs list`. Times are UTC."""

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
        """Whether the status is final."""
        return JobStatus(self.status).is_terminal()


class JobsClient(JobSubmissionClient):
    """Ray's client, with timeouts and with errors in one line. Ray's own waits forever when the network is cut."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            # Ray answers the upload of a package after it has stored it.
            seconds = UPLOAD_SECONDS if method == "PUT" else REQUEST_SECONDS
            response = super()._do_request(method, endpoint, timeout=(REQUEST_SECONDS, seconds), **options)
        except AuthenticationError as e:
            raise ConfigError(f"{self.get_address()} refuses the token; set RAY_AUTH_TOKEN to the token of the cluster") from e
        except OSError as e:  # the base class of all errors of the requests library
            raise ClusterUnavailableError(f"no answer from {self.get_address()}: {type(e).__name__}") from e
        if response.status_code == 404 and endpoint.startswith("/api/jobs/"):
            name = endpoint.split("/")[3]
            raise UnknownJobError(f"{self.get_address()} has no job {name}; lmu-dist jobs list shows the jobs it has")
        if response.status_code >= 400 and response.status_code != 404:
            error = ClusterUnavailableError if response.status_code >= 500 else FailedError
            last_line = (response.text.strip().splitlines() or [""])[-1]  # of a traceback
            raise error(f"{self.get_address()} answers {response.status_code}: {last_line[:300]}")
        return response


def connect(address: str | None) -> JobsClient:
    """A client of the cluster whose dashboard has this address. Raises ConfigError if the cluster cannot be used."""
    address = dashboard_address(address)
    os.environ[ADDRESSES[0]] = address  # Ray prefers the variable to its argument
    try:
        client = JobsClient(address)
    except ConfigError:
        raise
    except AuthenticationError as e:  # raised by Ray before a request
        raise ConfigError(
            "there is no token; set RAY_AUTH_TOKEN to the token of the cluster, or RAY_AUTH_MODE=disabled if it has none"
        ) from e
    except ClusterUnavailableError as e:
        raise ConfigError(f"{e}; start the cluster, or give the address of its dashboard") from e
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        raise ConfigError(f"{address} is not a Ray dashboard: {e or type(e).__name__}") from e
    cluster_version, local_version = str(client._server_ray_version), ray.__version__
    if cluster_version.split(".")[:2] != local_version.split(".")[:2]:
        raise ConfigError(
            f"{address} runs Ray {cluster_version}, and Ray {local_version} is installed here; install ray=={local_version} on "
            f"its nodes, or ray=={cluster_version} here"
        )
    return client


def submit(client: JobsClient, job_spec: "JobSpec") -> tuple[str, bool]:
    """Submits a job. Returns its id and whether it is new.

    A job with the same content that is still running is not submitted again. One that has ended is submitted again under the
    next number; it skips the runs that have a record.
    """
    known = {job.submission_id: job for job in client.list_jobs() if _has_name(job, job_spec.name)}
    for name, job in known.items():
        if not job.status.is_terminal():
            return str(name), False
    last = max((int(str(name)[len(job_spec.name) + 1 :] or 1) for name in known), default=0)
    new = f"{job_spec.name}-{last + 1}" if last else job_spec.name
    try:
        client.submit_job(
            entrypoint=job_spec.entrypoint,
            submission_id=new,
            runtime_env={
                "working_dir": str(job_spec.package.folder),
                "excludes": list(job_spec.package.excludes),
                "env_vars": job_spec.environment,
            },
            metadata=dict(job_spec.metadata),
        )
    except ClusterUnavailableError:
        # The request may have arrived although the answer was lost, or somebody else may have just submitted the same job.
        if new not in {job.submission_id for job in client.list_jobs()}:
            raise
        return new, False
    return new, True


def _has_name(job: JobDetails, name: str) -> bool:
    """Whether a job was submitted under this name, with or without a number."""
    return job.type is JobType.SUBMISSION and re.fullmatch(re.escape(name) + r"(-\d+)?", job.submission_id or "") is not None


def fetch_jobs(client: JobsClient) -> list[ClusterJob]:
    """All jobs of the cluster, of all users, latest first."""
    jobs = [job for job in client.list_jobs() if job.type is JobType.SUBMISSION]
    return [_row(job) for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)]


def stop(client: JobsClient, name: str, poll_seconds: float = 1.0) -> ClusterJob:
    """Interrupts a job, as Ctrl-C would, and waits until it has ended; Ray kills it after a minute. Returns the job."""
    client.stop_job(name)
    while not (job := _row(client.get_job_info(name))).ended:
        time.sleep(poll_seconds)
    return job


def follow(client: JobsClient, name: str, write: Callable[[str], None], notify: Callable[[str], None]) -> ClusterJob | None:
    """Passes the log of a job to `write` from its start to its end, each character once, even if the connection is lost.

    Calls `notify` with a message when the cluster stops answering and when it answers again. Returns the job, or None if the
    cluster was restarted and no longer has it. Raises UnknownJobError if the cluster never had it.
    """
    log, known, log_attempts, pause = _Log(client.get_address(), write, notify), False, 0, RETRY_SECONDS[0]
    while True:
        job, ended = None, False
        try:
            job = client.get_job_info(name)
            known, ended = True, job.status.is_terminal()
            log.rewind(job.start_time)
            asyncio.run(_tail(client, name, log))
            job = client.get_job_info(name)
            if log.is_complete and job.status.is_terminal():
                return _row(job)
            pause = RETRY_SECONDS[0]
        except UnknownJobError:
            if not known:
                raise
            return None
        except ClusterUnavailableError as e:
            log_attempts += ended
            if job is not None and log_attempts == MAX_LOG_ATTEMPTS:  # for example because the node with the log is gone
                notify(f"{e}; the rest of the log cannot be read")
                return _row(job)
            pause = min(2 * pause, RETRY_SECONDS[1]) if log.is_disconnected else RETRY_SECONDS[0]
            log.disconnected(e)
        time.sleep(pause)


class _Log:
    """Writes each character of a log once, although every connection delivers the log from its start."""

    def __init__(self, source: str, write: Callable[[str], None], notify: Callable[[str], None]) -> None:
        self._source, self._write, self._notify = source, write, notify
        self._start_time: int | None = None
        self._written, self._read = 0, 0  # characters: in all, and over this connection
        self.is_disconnected, self.is_complete = False, False

    def rewind(self, start_time: int | None) -> None:
        """Prepares to read the log from its start. A job with the same name and another start time is another job."""
        if start_time != self._start_time:
            self._start_time, self._written = start_time, 0
        self._read, self.is_complete = 0, False

    def add(self, text: str) -> None:
        """Writes the new characters of the next piece of text."""
        self._reconnected()
        new = text[max(0, self._written - self._read) :]
        self._read += len(text)
        if new:
            self._write(new)
            self._written += len(new)

    def end(self) -> None:
        """Marks the log as complete."""
        self._reconnected()
        self.is_complete = True

    def disconnected(self, error: Exception) -> None:
        """Notifies once that the connection is lost."""
        if not self.is_disconnected:
            self._notify(f"{error}; waiting until the cluster answers")
        self.is_disconnected = True

    def _reconnected(self) -> None:
        if self.is_disconnected:
            self._notify(f"{self._source} answers again")
        self.is_disconnected = False


async def _tail(client: JobsClient, name: str, log: _Log) -> None:
    """Reads a log until it ends, or until no text arrives for LOG_IDLE_SECONDS. Raises ClusterUnavailableError."""
    try:
        async with aclosing(client.tail_job_logs(name)) as pieces:  # pyright: ignore[reportArgumentType]
            while True:
                log.add(await asyncio.wait_for(anext(pieces), LOG_IDLE_SECONDS))
    except StopAsyncIteration:
        log.end()
    except TimeoutError:
        pass
    except (OSError, RuntimeError, aiohttp.ClientError) as e:
        raise ClusterUnavailableError(f"the connection to the log of {name} was lost: {e or type(e).__name__}") from e


def _row(job: JobDetails) -> ClusterJob:
    metadata = job.metadata or {}
    end_time = job.end_time or time.time() * 1000
    return ClusterJob(
        id=job.submission_id or "",
        status=str(job.status),
        command=metadata.get("command", ""),
        experiment=metadata.get("experiment", ""),
        config=metadata.get("config", ""),
        git_commit=metadata.get("git_commit", ""),
        git_dirty=metadata.get("git_dirty") == "true",
        started=datetime.fromtimestamp(job.start_time / 1000, UTC).isoformat(timespec="seconds") if job.start_time else "",
        seconds=(end_time - job.start_time) / 1000 if job.start_time else None,
        message=(job.message or "").partition("\n")[0] if job.status in (JobStatus.FAILED, JobStatus.STOPPED) else "",
    )
