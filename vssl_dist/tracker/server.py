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

_TRANSIENT_STATUSES = (408, 425, 429)
_SIGN_IN_REMEDY = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of "
    "somebody who may write there"
)
_NOT_THERE_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_MAX_BODY_BYTES = 1 << 20


def look_at_server(tracking_query: TrackingQuery, timeout_s: float) -> TrackingReport:
    """Report what keeps a server from taking the run."""
    try:
        with _open_session() as session:
            return _query_server(session, tracking_query, timeout_s)
    except SSLError as error:
        return TrackingReport(
            f"MLflow at {tracking_query.uri}: no secure connection ({_innermost_reason(error)}): "
            "http:// if it has none, MLFLOW_TRACKING_SERVER_CERT_PATH if its certificate is your "
            "own"
        )
    except ValueError as error:  # an address or a header that is none
        is_bad_login = isinstance(error, InvalidHeader | UnicodeError)
        reason = (
            "no server takes this user, password or token"
            if is_bad_login
            else _innermost_reason(error)
        )
        return TrackingReport(
            f"MLflow at {tracking_query.uri} cannot be asked ({reason}): correct "
            "MLFLOW_TRACKING_URI, or the variables that say how to sign in"
        )
    except (RequestException, HTTPError, OSError) as error:
        return tracking_query.report_unreachable(_innermost_reason(error))


def _query_server(
    session: requests.Session, tracking_query: TrackingQuery, timeout_s: float
) -> TrackingReport:
    api_calls: list[tuple[str, dict[str, str]]] = [
        ("experiments/get-by-name", {"experiment_name": tracking_query.experiment})
    ]
    if tracking_query.run_id is not None:
        api_calls.append(("runs/get", {"run_id": tracking_query.run_id}))
    for endpoint, parameters in api_calls:
        url = f"{tracking_query.uri}/api/2.0/mlflow/{endpoint}"
        # Named once more, as MLflow does: REQUESTS_CA_BUNDLE would go before the session's.
        with session.get(
            url,
            params=parameters,
            timeout=0.9 * timeout_s,
            stream=True,
            verify=session.verify,
        ) as reply:
            http_status, body = (
                reply.status_code,
                reply.raw.read(_MAX_BODY_BYTES, decode_content=True),
            )
            reply_object = _parse_object(reply, body)
        if obstacle := _reply_obstacle(tracking_query, http_status, reply_object, body):
            return obstacle
        experiment = _object_under(reply_object, "experiment")
        if experiment.get("lifecycle_stage") == "deleted":
            return tracking_query.experiment_in_bin(experiment.get("experiment_id"))
        run = _object_under(reply_object, "run")
        if (
            tracking_query.run_id
            and run
            and tracking_query.uuid not in _tag_values(run, "vssl_dist.run")
        ):
            return tracking_query.run_of_another()
        if _object_under(run, "info").get("lifecycle_stage") == "deleted":
            return tracking_query.run_in_bin(tracking_query.run_id)
    return TrackingReport()


def _tag_values(run: dict[str, Any], key: str) -> list[Any]:
    """Return the values of a run's tag: one, or none."""
    tags = _object_under(run, "data").get("tags")
    tag_objects = tags if isinstance(tags, list) else []
    return [
        tag.get("value") for tag in tag_objects if isinstance(tag, dict) and tag.get("key") == key
    ]


def _reply_obstacle(
    tracking_query: TrackingQuery, http_status: int, reply_object: dict[str, Any], body: bytes
) -> TrackingReport | None:
    """Report what a reply itself says against the server, whatever was asked."""
    if http_status >= 500 or http_status in _TRANSIENT_STATUSES:
        return tracking_query.report_unreachable(f"HTTP {http_status}")
    if http_status in (401, 403):
        if _signs_by_plugin():
            return tracking_query.report_unreachable(
                f"HTTP {http_status}; how MLflow signs its requests is not tried here"
            )
        body_text = printable(redact_secrets(" ".join(body[:200].decode(errors="replace").split())))
        remedy = "start it with --allowed-hosts" if "ebinding" in body_text else _SIGN_IN_REMEDY
        return TrackingReport(
            f"MLflow at {tracking_query.uri} lets nobody in "
            f"(HTTP {http_status}: {body_text}): {remedy}"
        )
    requested_object = _object_under(reply_object, "experiment") or _object_under(
        reply_object, "run"
    )
    if not requested_object and reply_object.get("error_code") not in _NOT_THERE_CODES:
        if _signs_by_plugin():
            return tracking_query.report_unreachable(
                f"HTTP {http_status}; how MLflow signs its requests is not tried here"
            )
        return TrackingReport(
            f"what answers at {tracking_query.uri} is no MLflow server (HTTP {http_status}): set "
            "MLFLOW_TRACKING_URI=http://HOST:PORT of one, as its log says"
        )
    return None


def _open_session() -> requests.Session:
    """Open a session that signs as MLflow does, by the environment's or its file's login."""
    session = requests.Session()
    login_file_values = read_stored_mlflow_login()
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or login_file_values.get(
        "mlflow_tracking_username"
    )
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or login_file_values.get(
        "mlflow_tracking_password"
    )
    if user and password:
        session.auth = (user.encode(), password.encode())
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        session.headers["Authorization"] = f"Bearer {token}"
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        session.verify = False
    elif ca_file := os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        session.verify = ca_file
    session.cert = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
    return session


def _signs_by_plugin() -> bool:
    """Whether MLflow signs requests in a way that only MLflow and its plugins know."""
    return any(
        os.environ.get(f"MLFLOW_TRACKING_{variable_suffix}")
        for variable_suffix in ("AUTH", "AWS_SIGV4")
    )


def _parse_object(reply: requests.Response, body: bytes) -> dict[str, Any]:
    try:
        reply_object = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return reply_object if isinstance(reply_object, dict) else {}


def _object_under(parent_object: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key, an empty one if there is none."""
    child_object = parent_object.get(key)
    return child_object if isinstance(child_object, dict) else {}


def _innermost_reason(error: Exception) -> str:
    """Describe the innermost cause, which says more than what it is wrapped in."""
    while isinstance(cause := error.__context__, Exception):
        error = cause
    if isinstance(error, ConnectionError) and not str(error):
        return "no connection"
    return printable(redact_secrets(str(error))) or type(error).__name__
