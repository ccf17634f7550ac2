"""Refusals: what a user can mend, as one line that names the thing and the remedy.

A command that meets one prints it and ends with `Refusal.exit_code`; see `console.endings`.
"""

from __future__ import annotations

from typing import ClassVar


class Refusal(ValueError):
    """A mistake that the user can mend; the message is one line with the thing and the remedy."""

    exit_code: ClassVar[int] = 2


class ConfigError(Refusal):
    """The configuration cannot be used; the message is one line with the key and the remedy."""


class DataError(Refusal):
    """The data cannot be used; the message is one line with the file and the remedy."""


class CheckpointError(Refusal):
    """A checkpoint could not be written, or none can be trusted; one line, on every rank."""


class ExportError(DataError):
    """An export cannot be used; the message is one line with the file and the remedy."""


class SubmissionError(Refusal):
    """SLURM is not here, or does not take the job; the message is one line."""
