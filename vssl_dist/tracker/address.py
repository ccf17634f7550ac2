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

NOWHERE = "none"
"""``MLFLOW_TRACKING_URI=none``: the spool keeps everything until ``launch/track.py`` sends it."""
EXPERIMENT = "vssl-dist"
"""MLflow's name for the group of all runs."""

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_DATABASES = ("postgresql", "mysql", "mssql")
_ANOTHER = "use http://HOST:PORT or sqlite:////absolute/path/mlflow.db"


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
    if uri.lower() == NOWHERE:
        return NOWHERE
    parts = _split(uri)
    file = sqlite_file(uri)
    if parts is not None and file is not None and not _is_uri(parts):
        return sqlite_uri(_expanded(parts), parts.query, parts.scheme)
    if parts is not None and parts.scheme in ("http", "https"):
        return parts._replace(path=parts.path.rstrip("/"), fragment="").geturl()
    return uri


def _expanded(parts: SplitResult) -> Path:
    try:
        return Path(unquote(expanded(parts.path[1:])))
    except ValueError as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI: {error}") from None


def sqlite_uri(file: Path, uri_query: str = "", scheme: str = "sqlite") -> str:
    """Write the address of an sqlite file: what would end or change the path becomes ``%XX``.

    >>> sqlite_uri(Path("/data/50 %/really?/mlflow.db"), "timeout=60")
    'sqlite:////data/50 %25/really%3F/mlflow.db?timeout=60'
    """
    path = re.sub(r"[%?#$\x00-\x1f]", lambda match: quote(match[0]), str(file.absolute()))
    return f"{scheme}:///{path}" + (f"?{uri_query}" if uri_query else "")


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the sqlite file behind ``uri``, ``None`` for anything else.

    >>> sqlite_file("http://127.0.0.1:5000") is None
    True
    >>> str(sqlite_file("sqlite:////data/50%25/mlflow.db?timeout=60"))
    '/data/50%/mlflow.db'
    """
    parts = _split(uri)
    if parts is None or parts.scheme.partition("+")[0] != "sqlite":
        return None
    if not uri.partition(":")[2].startswith("///"):
        return None
    name = unquote(parts.path[1:])
    if _is_uri(parts) and name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    return Path(name).absolute() if name not in ("", ":memory:") else None


def _is_uri(parts: SplitResult) -> bool:
    """Whether the path of a database is itself a URI, which SQLAlchemy hands on as it is."""
    return "uri" in parse_qs(parts.query)


def _split(uri: str) -> SplitResult | None:
    """Split a URI, or return ``None`` if it is none; only a server's has a fragment."""
    try:
        parts = urlsplit(uri, allow_fragments=uri.lower().startswith("http"))
        _ = parts.port  # a number, or it raises
    except ValueError:
        return None
    return parts


def check_tracking(uri: str, hosts: int) -> str | None:
    """Say in one line why ``uri`` cannot serve jobs on ``hosts`` machines, or return ``None``.

    It is known from the text alone and repeats no password; `look` asks who is there.

    >>> check_tracking("sqlite:////home/me/mlflow.db", hosts=1) is None
    True
    >>> check_tracking("http://login1:5000", hosts=8) is None
    True
    """
    if uri == NOWHERE:
        return None
    parts = _split(uri)
    if has_secret_in_address(uri):
        remedy = "use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if uri.partition(":")[0].partition("+")[0].lower() in _DATABASES:
            remedy = (
                "have `mlflow server` use that database and set "
                "MLFLOW_TRACKING_URI=http://HOST:PORT, or leave them to the database's driver "
                "(PGUSER and ~/.pgpass, say)"
            )
        return (
            "MLFLOW_TRACKING_URI names a user, a password or a token, and would be written into "
            f"the run folder: {remedy}"
        )
    if parts is None:
        return f"MLFLOW_TRACKING_URI={uri} is no address: {_ANOTHER}"
    kind = parts.scheme.partition("+")[0]
    if kind == "sqlite":
        return _check_sqlite(uri, parts, hosts)
    if (kind == "" and uri != "databricks") or kind == "file":
        return f"MLFLOW_TRACKING_URI={uri}: MLflow no longer writes to plain folders; {_ANOTHER}"
    if kind in ("http", "https") and (not parts.hostname or parts.query):
        return f"MLFLOW_TRACKING_URI={uri} is not of the form {kind}://HOST:PORT"
    if kind in _SCHEMES or uri == "databricks" or kind in _plugins():
        return None
    near = get_close_matches(kind, _SCHEMES, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"MLFLOW_TRACKING_URI={uri}: MLflow knows no scheme {parts.scheme}:{meant}; {_ANOTHER}"


def _check_sqlite(uri: str, parts: SplitResult, hosts: int) -> str | None:
    file = sqlite_file(uri)
    if file is None:
        return f"MLFLOW_TRACKING_URI={uri} names no file: use sqlite:////absolute/path/mlflow.db"
    if hosts > 1:
        return (
            f"tracking to {uri} with jobs on {hosts} hosts: sqlite takes writers of one machine "
            "only; start `mlflow server` and set MLFLOW_TRACKING_URI=http://HOST:PORT, or set "
            f"MLFLOW_TRACKING_URI={NOWHERE} and have "
            f"`{command_line('launch/track.py')} RUN --to {uri}` send the curves later"
        )
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return (
            f"tracking to {os.fsencode(file)!r}: MLflow takes no path that is not UTF-8; set "
            "MLFLOW_TRACKING_URI=sqlite:////another/folder/mlflow.db"
        )
    return None


def _plugins() -> set[str]:
    """Return the schemes that installed packages add to MLflow."""
    return {point.name for point in entry_points(group="mlflow.tracking_store")}
