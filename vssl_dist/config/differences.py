"""The keys in which two configurations differ, with both values, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

_SHORT = 4
"""Entries up to which a list of plain values counts as one value."""
_LONGEST = 60
_BEFORE = 20
"""Characters shown of what two long texts have in common."""
_NAMED = 8


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """Dotted keys whose values differ, each with both values; of lists also the place.

    The name of a block comes before its other keys.

    Args:
        then: The earlier configuration or block, as plain values.
        now: The present one.
        key: Dotted key of both blocks.

    >>> then = {"lr": 0.1, "views": [{"blur": 0.5, "scale": [0.2, 1]}]}
    >>> differences(then, {"lr": 0.1, "views": [{"blur": 0.0, "scale": [0.1, 1]}]})
    ['views[0].blur (0.5 then, 0.0 now)', 'views[0].scale ([0.2, 1] then, [0.1, 1] now)']
    >>> differences({"views": [{"blur": 0.5}]}, {"views": [{"blur": 0.5}, {"blur": 0.1}]})
    ['views (1 entry then, 2 entries now)']
    """
    if then == now:
        return []
    blocks = [side for side in (then, now) if isinstance(side, Mapping)]
    if blocks and all(side is None or side in blocks for side in (then, now)):
        old, new = then or {}, now or {}
        names = sorted(old.keys() | new.keys(), key=lambda name: (name != "name", str(name)))
        return [
            line
            for name in names
            for line in differences(
                old.get(name), new.get(name), f"{key}.{name}" if key else str(name)
            )
        ]
    lists = all(isinstance(side, (list, tuple)) for side in (then, now))
    if lists and (_has_entries(then) or _has_entries(now)):
        count = [] if len(then) == len(now) else [_both_values(key, then, now)]
        pairs = enumerate(zip(then, now, strict=False))
        return count + [line for n, pair in pairs for line in differences(*pair, f"{key}[{n}]")]
    return [_both_values(key, then, now)]


def named(changed: Sequence[str]) -> str:
    """The first few of the keys that differ in one line, the others counted.

    >>> named(["seed (0 then, 1 now)", "lr (1 then, 2 now)"])
    'seed (0 then, 1 now), lr (1 then, 2 now)'
    """
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return f"{', '.join(changed[:_NAMED])}{more}"


def _has_entries(value: Any) -> bool:
    """Whether a value is a list that is compared entry by entry."""
    if not isinstance(value, (list, tuple)):
        return False
    return len(value) > _SHORT or any(isinstance(entry, (Mapping, list, tuple)) for entry in value)


def _both_values(key: str, then: Any, now: Any) -> str:
    """Show both values; of long ones, such as paths, the place where they part."""
    texts = _text(then), _text(now)
    start = 0
    if max(map(len, texts)) > _LONGEST:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
        start = max(same - _BEFORE, 0)
    old, new = (
        f"{'...' * (start > 0)}{text[start : start + _LONGEST]}"
        f"{'...' * (len(text) > start + _LONGEST)}"
        for text in texts
    )
    return f"{key} ({old} then, {new} now)"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a block of {len(value)} keys"
    if _has_entries(value):
        return f"{len(value)} entr{'y' if len(value) == 1 else 'ies'}"
    return str(value)
