"""Where curves go: addresses, taken apart and put together as SQLAlchemy and MLflow read them."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from vssl_dist.confidential import has_secret_in_address
from vssl_dist.config.paths import expanded
from vssl_dist.errors import ConfigError
from vssl_dist.installed import command_line

NO_TRACKING = "none"
"""``MLFLOW_TRACKING_URI=none``: the spool keeps everything until ``launch/track.py`` sends it."""
EXPERIMENT_NAME = "vssl-dist"
"""MLflow's name for the group of all runs."""

_MLFLOW_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_DATABASE_SCHEMES = ("postgresql", "mysql", "mssql")
_ADDRESS_REMEDY = "use http://HOST:PORT or sqlite:////absolute/path/mlflow.db"


def default_tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI``, or a database in the current folder, as ``mlflow ui`` does.

    Raises:
        ConfigError: A variable in it is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return normalised_uri(uri) if uri else sqlite_uri(Path("mlflow.db"))


def normalised_uri(uri: str) -> str:
    """Normalise an address that a user typed, so that it means the same in every folder.

    The path of a database may begin with ``~`` and name variables, as all paths may.

    >>> (
    ...     normalised_uri("http://login1:5000/#/experiments/1"),
    ...     normalised_uri("sqlite:////data/m.db?timeout=60"),
    ... )
    ('http://login1:5000', 'sqlite:////data/m.db?timeout=60')
    """
    uri = uri.strip()
    if uri.lower() == NO_TRACKING:
        return NO_TRACKING
    uri_parts = _split_uri(uri)
    file = sqlite_file(uri)
    if uri_parts is not None and file is not None and not _has_uri_path(uri_parts):
        return sqlite_uri(_expanded_path(uri_parts), uri_parts.query, uri_parts.scheme)
    if uri_parts is not None and uri_parts.scheme in ("http", "https"):
        return uri_parts._replace(path=uri_parts.path.rstrip("/"), fragment="").geturl()
    return uri


def _expanded_path(uri_parts: SplitResult) -> Path:
    try:
        return Path(unquote(expanded(uri_parts.path[1:])))
    except ValueError as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI: {error}") from None


def sqlite_uri(database_path: Path, uri_query: str = "", scheme: str = "sqlite") -> str:
    """Write the address of an sqlite file: what would end or change the path becomes ``%XX``.

    >>> sqlite_uri(Path("/data/50 %/really?/mlflow.db"), "timeout=60")
    'sqlite:////data/50 %25/really%3F/mlflow.db?timeout=60'
    """
    path = re.sub(r"[%?#$\x00-\x1f]", lambda match: quote(match[0]), str(database_path.absolute()))
    return f"{scheme}:///{path}" + (f"?{uri_query}" if uri_query else "")


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the sqlite file behind ``uri``, ``None`` for anything else.

    >>> sqlite_file("http://127.0.0.1:5000") is None
    True
    >>> str(sqlite_file("sqlite:////data/50%25/mlflow.db?timeout=60"))
    '/data/50%/mlflow.db'
    """
    uri_parts = _split_uri(uri)
    if uri_parts is None or uri_parts.scheme.partition("+")[0] != "sqlite":
        return None
    if not uri.partition(":")[2].startswith("///"):
        return None
    path_text = unquote(uri_parts.path[1:])
    if _has_uri_path(uri_parts) and path_text.startswith("file:"):
        path_text = unquote(urlsplit(path_text).path)
    return Path(path_text).absolute() if path_text not in ("", ":memory:") else None


def _has_uri_path(uri_parts: SplitResult) -> bool:
    """Whether the path of a database is itself a URI, which SQLAlchemy hands on as it is."""
    return "uri" in parse_qs(uri_parts.query)


def _split_uri(uri: str) -> SplitResult | None:
    """Split a URI, or return ``None`` if it is none; only a server's has a fragment."""
    try:
        uri_parts = urlsplit(uri, allow_fragments=uri.lower().startswith("http"))
        _ = uri_parts.port  # a number, or it raises
    except ValueError:
        return None
    return uri_parts


def check_tracking(uri: str, num_hosts: int) -> str | None:
    """Say in one line why ``uri`` cannot serve jobs on ``num_hosts`` machines, or return ``None``.

    It is known from the text alone and repeats no password; `look` asks who is there.

    >>> check_tracking("sqlite:////home/me/mlflow.db", num_hosts=1) is None
    True
    >>> check_tracking("http://login1:5000", num_hosts=8) is None
    True
    """
    if uri == NO_TRACKING:
        return None
    uri_parts = _split_uri(uri)
    if has_secret_in_address(uri):
        remedy = "use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if uri.partition(":")[0].partition("+")[0].lower() in _DATABASE_SCHEMES:
            remedy = (
                "have `mlflow server` use that database and set "
                "MLFLOW_TRACKING_URI=http://HOST:PORT, or leave them to the database's driver "
                "(PGUSER and ~/.pgpass, say)"
            )
        return (
            "MLFLOW_TRACKING_URI names a user, a password or a token, and would be written into "
            f"the run folder: {remedy}"
        )
    if uri_parts is None:
        return f"MLFLOW_TRACKING_URI={uri} is no address: {_ADDRESS_REMEDY}"
    base_scheme = uri_parts.scheme.partition("+")[0]
    if base_scheme == "sqlite":
        return _check_sqlite(uri, uri_parts, num_hosts)
    if (base_scheme == "" and uri != "databricks") or base_scheme == "file":
        return (
            f"MLFLOW_TRACKING_URI={uri}: MLflow no longer writes to plain folders; "
            f"{_ADDRESS_REMEDY}"
        )
    if base_scheme in ("http", "https") and (not uri_parts.hostname or uri_parts.query):
        return f"MLFLOW_TRACKING_URI={uri} is not of the form {base_scheme}://HOST:PORT"
    if base_scheme in _MLFLOW_SCHEMES or uri == "databricks" or base_scheme in _plugin_schemes():
        return None
    near_schemes = get_close_matches(base_scheme, _MLFLOW_SCHEMES, n=1)
    suggestion = f" (did you mean {near_schemes[0]}?)" if near_schemes else ""
    return (
        f"MLFLOW_TRACKING_URI={uri}: MLflow knows no scheme {uri_parts.scheme}:{suggestion}; "
        f"{_ADDRESS_REMEDY}"
    )


def _check_sqlite(uri: str, uri_parts: SplitResult, num_hosts: int) -> str | None:
    database_path = sqlite_file(uri)
    if database_path is None:
        return f"MLFLOW_TRACKING_URI={uri} names no file: use sqlite:////absolute/path/mlflow.db"
    if num_hosts > 1:
        return (
            f"tracking to {uri} with jobs on {num_hosts} hosts: sqlite takes writers of one "
            "machine only; start `mlflow server` and set MLFLOW_TRACKING_URI=http://HOST:PORT, "
            f"or set MLFLOW_TRACKING_URI={NO_TRACKING} and have "
            f"`{command_line('launch/track.py')} RUN --to {uri}` send the curves later"
        )
    try:
        str(database_path).encode()
    except UnicodeEncodeError:
        return (
            f"tracking to {os.fsencode(database_path)!r}: MLflow takes no path that is not "
            "UTF-8; set MLFLOW_TRACKING_URI=sqlite:////another/folder/mlflow.db"
        )
    return None


def _plugin_schemes() -> set[str]:
    """Return the schemes that installed packages add to MLflow."""
    return {point.name for point in entry_points(group="mlflow.tracking_store")}
