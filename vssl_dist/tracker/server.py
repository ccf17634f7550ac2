"""A look at a tracking server, as MLflow's own client would ask it."""

from __future__ import annotations

import json
import os
from typing import Any

import requests
from requests.exceptions import ConnectionError, InvalidHeader, RequestException, SSLError
from urllib3.exceptions import HTTPError

from vssl_dist.confidential import read_stored_mlflow_login, redact_secrets
from vssl_dist.text import printable
from vssl_dist.tracker.report import TrackingQuery, TrackingReport

_PASSING = (408, 425, 429)
_RIGHTS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of "
    "somebody who may write there"
)
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_LONGEST = 1 << 20


def look_at_server(question: TrackingQuery, timeout_s: float) -> TrackingReport:
    """Report what keeps a server from taking the run."""
    try:
        with _session() as session:
            return _ask(session, question, timeout_s)
    except SSLError as error:
        return TrackingReport(
            f"MLflow at {question.uri}: no secure connection ({_reason(error)}): http:// if it has "
            "none, MLFLOW_TRACKING_SERVER_CERT_PATH if its certificate is your own"
        )
    except ValueError as error:  # an address or a header that is none
        is_secret = isinstance(error, InvalidHeader | UnicodeError)
        reason = "no server takes this user, password or token" if is_secret else _reason(error)
        return TrackingReport(
            f"MLflow at {question.uri} cannot be asked ({reason}): correct MLFLOW_TRACKING_URI, or "
            "the variables that say how to sign in"
        )
    except (RequestException, HTTPError, OSError) as error:
        return question.away(_reason(error))


def _ask(session: requests.Session, question: TrackingQuery, timeout_s: float) -> TrackingReport:
    asked: list[tuple[str, dict[str, str]]] = [
        ("experiments/get-by-name", {"experiment_name": question.experiment})
    ]
    if question.run_id is not None:
        asked.append(("runs/get", {"run_id": question.run_id}))
    for what, parameters in asked:
        url = f"{question.uri}/api/2.0/mlflow/{what}"
        # Named once more, as MLflow does: REQUESTS_CA_BUNDLE would go before the session's.
        with session.get(
            url,
            params=parameters,
            timeout=0.9 * timeout_s,
            stream=True,
            verify=session.verify,
        ) as reply:
            status, body = reply.status_code, reply.raw.read(_LONGEST, decode_content=True)
            facts = _json(reply, body)
        if obstacle := _obstacle(question, status, facts, body):
            return obstacle
        experiment = _inside(facts, "experiment")
        if experiment.get("lifecycle_stage") == "deleted":
            return question.experiment_in_bin(experiment.get("experiment_id"))
        run = _inside(facts, "run")
        if question.run_id and run and question.uuid not in _tagged(run, "vssl_dist.run"):
            return question.run_of_another()
        if _inside(run, "info").get("lifecycle_stage") == "deleted":
            return question.run_in_bin(question.run_id)
    return TrackingReport()


def _tagged(run: dict[str, Any], key: str) -> list[Any]:
    """Return the values of a run's tag: one, or none."""
    tags = _inside(run, "data").get("tags")
    pairs = tags if isinstance(tags, list) else []
    return [tag.get("value") for tag in pairs if isinstance(tag, dict) and tag.get("key") == key]


def _obstacle(
    question: TrackingQuery, status: int, facts: dict[str, Any], body: bytes
) -> TrackingReport | None:
    """Report what a reply itself says against the server, whatever was asked."""
    if status >= 500 or status in _PASSING:
        return question.away(f"HTTP {status}")
    if status in (401, 403):
        if _own_way_in():
            return question.away(f"HTTP {status}; how MLflow signs its requests is not tried here")
        said = printable(redact_secrets(" ".join(body[:200].decode(errors="replace").split())))
        remedy = "start it with --allowed-hosts" if "ebinding" in said else _RIGHTS
        return TrackingReport(
            f"MLflow at {question.uri} lets nobody in (HTTP {status}: {said}): {remedy}"
        )
    asked = _inside(facts, "experiment") or _inside(facts, "run")
    if not asked and facts.get("error_code") not in _NOT_THERE:
        if _own_way_in():
            return question.away(f"HTTP {status}; how MLflow signs its requests is not tried here")
        return TrackingReport(
            f"what answers at {question.uri} is no MLflow server (HTTP {status}): set "
            "MLFLOW_TRACKING_URI=http://HOST:PORT of one, as its log says"
        )
    return None


def _session() -> requests.Session:
    """Open a session that signs as MLflow does, by the environment's or its file's login."""
    session = requests.Session()
    mlflow = read_stored_mlflow_login()
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or mlflow.get("mlflow_tracking_username")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or mlflow.get("mlflow_tracking_password")
    if user and password:
        session.auth = (user.encode(), password.encode())
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        session.headers["Authorization"] = f"Bearer {token}"
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        session.verify = False
    elif authority := os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        session.verify = authority
    session.cert = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
    return session


def _own_way_in() -> bool:
    """Whether MLflow signs requests in a way that only MLflow and its plugins know."""
    return any(os.environ.get(f"MLFLOW_TRACKING_{way}") for way in ("AUTH", "AWS_SIGV4"))


def _json(reply: requests.Response, body: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _inside(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key, an empty one if there is none."""
    inner = facts.get(key)
    return inner if isinstance(inner, dict) else {}


def _reason(error: Exception) -> str:
    """Describe the innermost cause, which says more than what it is wrapped in."""
    while isinstance(inner := error.__context__, Exception):
        error = inner
    if isinstance(error, ConnectionError) and not str(error):
        return "no connection"
    return printable(redact_secrets(str(error))) or type(error).__name__
