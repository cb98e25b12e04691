"""What can go wrong with MLflow and with other drivers, for processes that do not import MLflow too."""

import re

from lmu_dist import storage
from lmu_dist.config import ConfigError, FailedError

OUTAGE_TIMEOUT_SECONDS = 15.0  # how long a run that ends waits for an MLflow that has not answered before either
STILL_RUNNING = "the upload is still running"  # why something is not uploaded, if nothing is wrong


class MLflowUnavailableError(FailedError):
    """The MLflow store does not answer, or answers with an error. `reason` is the error without store and advice."""

    reason = ""


class BusyError(ConfigError):
    """Another driver is training the cell."""


class OwnerUnresponsiveError(BusyError):
    """Another driver owns the run, and its last heartbeat is recent. It may be dead: wait HEARTBEAT_TIMEOUT_SECONDS to know."""


def one_line(error: BaseException) -> str:
    """The message of an error in one line, at most 300 characters. Of a database's or a connection's error only the reason."""
    if isinstance(error, MLflowUnavailableError) and error.reason:
        return error.reason
    text = " ".join(str(error).split())
    text = re.sub(r"^\(raised as a result of Query-invoked autoflush;[^)]*\) ", "", text)
    text = re.split(r" ?\[SQL: | ?\(Background on this error at: ", text)[0]
    text = re.sub(r"^.*\(Caused by .*: ([^:]+?)[\"')]*$", r"\1", text)
    return storage.error_text(re.sub(r"^\((\w+\.)*\w+Error\) ", "", text)[:300])
