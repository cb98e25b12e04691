"""The URI of an MLflow store: whether one can exist there, and whether it answers. Called by store, before MLflow is asked.

MLflow finds out too, but late: it retries a database whose port is closed for more than a minute and a half.
"""

import difflib
import http.client
import socket
import urllib.error
import urllib.request
from urllib.parse import SplitResult, urlsplit

from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE
from mlflow.store.db.db_types import DATABASE_ENGINES, MSSQL, MYSQL, POSTGRES, SQLITE
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from lmu_dist.config import ConfigError
from lmu_dist.tracking.passwords import check_no_password

CONNECT_SECONDS = 5.0  # how long a database may take to accept a connection
ANSWER_SECONDS = 10.0  # how long a server may take to answer a request
PORTS = {POSTGRES: 5432, MYSQL: 3306, MSSQL: 1433}
HTTP = ("http", "https")


def check_uri(uri: str) -> None:
    """Raises ConfigError if there can be no store at a URI, or if the URI holds a password. Asks no server."""
    check_no_password(uri)
    parts = urlsplit(uri)
    try:
        _ = parts.port
    except ValueError as e:
        raise _wrong(uri, str(e)) from e
    scheme = _scheme(uri, parts)
    if scheme in ("", "file"):
        if not MLFLOW_ALLOW_FILE_STORE.get():
            moved = (
                "this is a folder, and MLflow keeps no runs in folders any more (`mlflow migrate-filestore` copies old ones)"
            )
            raise _wrong(uri, moved)
    elif scheme in DATABASE_ENGINES:
        _check_database(uri)
    elif scheme in HTTP:
        if not uri.startswith(f"{scheme}://") or not parts.hostname:
            raise _wrong(uri, "this names no host")
    elif scheme != "databricks":
        similar = difflib.get_close_matches(scheme, [*HTTP, *DATABASE_ENGINES], 1)
        raise _wrong(uri, f"MLflow has no store at {scheme}://{f'; did you mean {similar[0]}://?' if similar else ''}")


def outage_of(uri: str) -> str:
    """Why the server of a store does not answer, after seconds; "" if it does, or if there is no simple way to find out."""
    parts = urlsplit(uri)
    scheme = _scheme(uri, parts)
    try:
        if scheme in HTTP:
            # Any answer will do. urllib takes the same proxies from the environment as MLflow does.
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
        # A list of hosts, or a socket's folder in the query, is left to the database's client.
        elif scheme in PORTS and parts.hostname and "," not in parts.netloc and "host=" not in parts.query:
            socket.create_connection((parts.hostname, parts.port or PORTS[scheme]), CONNECT_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as e:  # ValueError: a host that cannot be encoded
        error = e.reason if isinstance(e, urllib.error.URLError) else e
        if isinstance(error, TimeoutError):
            return f"no answer in {ANSWER_SECONDS if scheme in HTTP else CONNECT_SECONDS:.0f} seconds"
        if scheme in HTTP:
            return ""  # it has answered, or fails at once, and MLflow's client says why
        return e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    return ""


def _check_database(uri: str) -> None:
    """Raises ConfigError if SQLAlchemy cannot read the URI, or has no driver for it."""
    try:
        url = make_url(uri)
        dialect = url.get_dialect()
        dialect().create_connect_args(url)
        dialect.import_dbapi()
    except (SQLAlchemyError, ValueError) as e:
        raise _wrong(uri, " ".join(str(e).split()).partition(" Valid SQLite")[0]) from e
    except ImportError as e:
        raise _wrong(uri, f"the driver of this database is not installed ({e})") from e


def _scheme(uri: str, parts: SplitResult) -> str:
    return "databricks" if uri == "databricks" else parts.scheme.partition("+")[0]


def _wrong(uri: str, reason: str) -> ConfigError:
    return ConfigError(f"MLFLOW_TRACKING_URI={uri}: {reason}; set it to http://HOST:PORT or {SQLITE}:////FOLDER/mlflow.db")
