"""What MLflow says no to, told apart from what may pass; knows its errors by what they carry."""

from __future__ import annotations

import errno

from vssl_dist.confidential import redact_secrets
from vssl_dist.text import printable

_TRANSIENT_CODES = {
    "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED",
    "CANCELLED", "ABORTED", "RESOURCE_CONFLICT", "INTERNAL_ERROR",
}  # fmt: skip
_TRANSIENT_STATUSES = (408, 425, 429)
_LASTING_FILE_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip


class RefusedByMlflow(RuntimeError):
    """Refusal of all of a run; the message says what somebody has to do about it."""


def is_transient(error: Exception) -> bool:
    """Whether an error may pass by itself: the server is away, busy or at fault.

    >>> is_transient(ConnectionResetError()), is_transient(PermissionError(errno.EACCES, "no"))
    (True, False)
    """
    if (error_code := _mlflow_error_code(error)) is not None:
        return error_code in _TRANSIENT_CODES
    http_status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(http_status, int):
        return http_status >= 500 or http_status in _TRANSIENT_STATUSES
    if isinstance(error, OSError):
        return error.errno not in _LASTING_FILE_ERRNOS
    return not isinstance(
        error, RefusedByMlflow | ValueError | TypeError | LookupError | ImportError | RecursionError
    )


def is_ambiguous(error: Exception) -> bool:
    """Whether an error may as well be one value's fault as the server's.

    What a database cannot store is an internal error to MLflow, and so is a server that is away.
    """
    return _mlflow_error_code(error) == "INTERNAL_ERROR"


def _mlflow_error_code(error: Exception) -> str | None:
    """Return the code of an MLflow exception, of others ``None``."""
    code = getattr(error, "error_code", None)
    return code if isinstance(code, str) else None


def error_line(error: Exception) -> str:
    """Describe an error in one line of bounded length that holds no password."""
    message = printable(" ".join(redact_secrets(str(error)).split())[:300])
    return message if isinstance(error, RefusedByMlflow) else f"{type(error).__name__}: {message}"
