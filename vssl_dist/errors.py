"""Refusals that several rooms share: one line that names the thing and the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used; the message is one line with the file and the remedy."""
