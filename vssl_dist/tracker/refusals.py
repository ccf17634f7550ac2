"""What MLflow says no to, told apart from what may pass; knows its errors by what they carry."""

from __future__ import annotations

import errno

from vssl_dist.confidential import redact
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
    """MLflow will take nothing of this run until somebody does something, which it says."""


def is_transient(error: Exception) -> bool:
    """Whether the same may work later: the server is away, busy or at fault.

    >>> may_pass(ConnectionResetError()), may_pass(PermissionError(errno.EACCES, "no"))
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
    """Whether it may as well be one value's fault: what a database cannot store is a fault of
    the server's to MLflow, and so is a server that is away."""
    return _code(error) == "INTERNAL_ERROR"


def _code(error: Exception) -> str | None:
    """That of an MLflow exception."""
    code = getattr(error, "error_code", None)
    return code if isinstance(code, str) else None


def error_line(error: Exception) -> str:
    """What an error says, in a line of bounded length that holds no password."""
    said = printable(" ".join(redact(str(error)).split())[:300])
    return said if isinstance(error, Refused) else f"{type(error).__name__}: {said}"
