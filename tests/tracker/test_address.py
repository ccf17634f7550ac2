"""Addresses mean to us what they mean to SQLAlchemy, which opens them for MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url

from vssl_dist.errors import ConfigError
from vssl_dist.tracker import check_tracking, default_tracking_uri, normalised_uri
from vssl_dist.tracker.address import sqlite_file, sqlite_uri

NAMES = [
    "plain",
    "two words",
    "50%",
    "50%25",
    "what?",
    "a#b",
    "a&b=c",
    "a+b",
    "größe",
    "a@b:c",
    "'",
    "$x",
    "~",
]


@pytest.mark.parametrize("typed", ["~/m.db?timeout=60", "$HOME/m.db?timeout=60"])
def test_an_address_may_name_the_home_folder_and_variables_as_every_path_may(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{typed}")
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/m.db?timeout=60"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///$VSSL_IS_NOT_SET/m.db")
    with pytest.raises(ConfigError, match="VSSL_IS_NOT_SET is not set"):
        default_tracking_uri()


@pytest.mark.parametrize("name", NAMES)
def test_a_database_may_lie_in_a_folder_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = default_tracking_uri()
    assert make_url(uri).database == str(folder / "mlflow.db")
    assert sqlite_file(uri) == folder / "mlflow.db"
    assert normalised_uri(uri) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f" {uri}?timeout=60 ")
    parsed = make_url(default_tracking_uri())
    assert (parsed.database, parsed.query["timeout"]) == (str(folder / "mlflow.db"), "60")
    assert check_tracking(uri, num_hosts=1) is None


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("sqlite:///sub/x.db", "sqlite:///{here}/sub/x.db"),
        ("sqlite:///sub/x.db?timeout=60", "sqlite:///{here}/sub/x.db?timeout=60"),
        ("sqlite+pysqlite:///x.db", "sqlite+pysqlite:///{here}/x.db"),
        ("sqlite:////a/x.db", "sqlite:////a/x.db"),
        ("http://host:5000/", "http://host:5000"),
        ("https://host/mlflow/", "https://host/mlflow"),
        ("http://host:5000/#/experiments/3", "http://host:5000"),
        ("postgresql://db/mlflow?sslmode=require", "postgresql://db/mlflow?sslmode=require"),
        ("databricks", "databricks"),
        ("None", "none"),
    ],
)
def test_an_address_is_the_same_from_every_folder(
    uri: str, same: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = normalised_uri(uri)
    assert absolute == same.format(here=tmp_path)
    monkeypatch.chdir("/")
    assert normalised_uri(absolute) == absolute
    assert check_tracking(absolute, num_hosts=1) is None


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("localhost:5000", "http://HOST:PORT"),
        ("10.0.0.1:5000", "http://HOST:PORT"),
        ("htp://host:5000", "did you mean http?"),
        ("sqlit:///x.db", "did you mean sqlite?"),
        ("postgres://db/x", "did you mean postgresql?"),
        ("http://", "http://HOST:PORT"),
        ("http:/host:5000", "http://HOST:PORT"),
        ("http://host:port", "http://HOST:PORT"),
        ("http://[::1:5000", "http://HOST:PORT"),
        ("sqlite:x.db", "sqlite:////absolute"),
        ("sqlite:/data/x.db", "sqlite:////absolute"),
        ("sqlite://data/x.db", "sqlite:////absolute"),
        ("sqlite://", "sqlite:////absolute"),
        ("sqlite:///", "sqlite:////absolute"),
        ("sqlite:///:memory:", "sqlite:////absolute"),
        ("/data/mlruns", "sqlite:////absolute"),
        ("sqlite:////data/caf\udce9/x.db", "UTF-8"),
    ],
)
def test_an_address_that_nobody_can_use_is_refused_with_the_remedy(uri: str, remedy: str) -> None:
    line = check_tracking(normalised_uri(uri), num_hosts=1)
    assert line is not None
    assert remedy in line
    assert "\n" not in line
    line.encode()


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@host:5000",
        "http://hunter2@host",
        "https://me:hunter2/x@host/prefix",
        "postgresql://me:hunter2@db/mlflow",
        "mysql+pymysql://me:hunter2@db:3306/mlflow?charset=utf8",
        "postgresql://db/mlflow?user=me&password=hunter2",
    ],
)
def test_passwords_are_refused_in_every_scheme_and_not_repeated(uri: str) -> None:
    line = check_tracking(normalised_uri(uri), num_hosts=1)
    assert line is not None
    is_database = not uri.startswith("http")  # whose driver knows nothing of MLflow's variables
    assert ("PGUSER" if is_database else "MLFLOW_TRACKING_PASSWORD") in line
    assert "hunter2" not in line
    assert check_tracking("http://host:5000/user@team", num_hosts=1) is None


def test_without_a_tracker_jobs_may_run_on_any_number_of_hosts(tmp_path: Path) -> None:
    assert check_tracking("none", num_hosts=64) is None
    line = check_tracking(sqlite_uri(tmp_path / "mlflow.db"), num_hosts=2)
    assert line is not None
    assert "MLFLOW_TRACKING_URI=none" in line
    assert "launch/track.py" in line
