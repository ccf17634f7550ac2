"""What MLflow says no to, told apart from what may pass; knows its errors by what they carry."""

from __future__ import annotations

import errno

from vssl_dist.confidential import redact_secrets
from vssl_dist.text import printable

_PASSING_CODES = {
    "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED",
    "CANCELLED", "ABORTED", "RESOURCE_CONFLICT", "INTERNAL_ERROR",
}  # fmt: skip
_PASSING_STATUS = (408, 425, 429)
_LASTING_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip


class Refused(RuntimeError):
    """Refusal of all of a run; the message says what somebody has to do about it."""


def is_transient(error: Exception) -> bool:
    """Whether an error may pass by itself: the server is away, busy or at fault.

    >>> is_transient(ConnectionResetError()), is_transient(PermissionError(errno.EACCES, "no"))
    (True, False)
    """
    if (code := _code(error)) is not None:
        return code in _PASSING_CODES
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, OSError):
        return error.errno not in _LASTING_ERRNOS
    return not isinstance(
        error, Refused | ValueError | TypeError | LookupError | ImportError | RecursionError
    )


def is_ambiguous(error: Exception) -> bool:
    """Whether an error may as well be one value's fault as the server's.

    What a database cannot store is an internal error to MLflow, and so is a server that is away.
    """
    return _code(error) == "INTERNAL_ERROR"


def _code(error: Exception) -> str | None:
    """Return the code of an MLflow exception, of others ``None``."""
    code = getattr(error, "error_code", None)
    return code if isinstance(code, str) else None


def error_line(error: Exception) -> str:
    """Describe an error in one line of bounded length that holds no password."""
    message = printable(" ".join(redact_secrets(str(error)).split())[:300])
    return message if isinstance(error, Refused) else f"{type(error).__name__}: {message}"
