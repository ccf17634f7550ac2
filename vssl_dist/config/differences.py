"""Which keys of two configurations differ, and how, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

_SHORT = 4
"""A list of so many plain values is one value."""
_LONGEST = 60
_BEFORE = 20
"""Of what long texts have in common, so many characters are shown."""
_NAMED = 8


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """Dotted keys whose values differ, each with both values; of lists also the place.

    The name of a block comes before its other keys.

    Args:
        then: What was, as plain values.
        now: What is.
        key: Where both stand.

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
        each = ((name, f"{key}.{name}" if key else str(name)) for name in names)
        return [said for n, to in each for said in differences(old.get(n), new.get(n), to)]
    lists = all(isinstance(side, (list, tuple)) for side in (then, now))
    if lists and (_has_entries(then) or _has_entries(now)):
        count = [] if len(then) == len(now) else [_said(key, then, now)]
        pairs = enumerate(zip(then, now, strict=False))
        return count + [said for n, pair in pairs for said in differences(*pair, f"{key}[{n}]")]
    return [_said(key, then, now)]


def named(changed: Sequence[str]) -> str:
    """The first few of the keys that differ in one line, the others counted.

    >>> named(["seed (0 then, 1 now)", "lr (1 then, 2 now)"])
    'seed (0 then, 1 now), lr (1 then, 2 now)'
    """
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return f"{', '.join(changed[:_NAMED])}{more}"


def _has_entries(value: Any) -> bool:
    """Whether it is a list that is told apart entry by entry."""
    if not isinstance(value, (list, tuple)):
        return False
    return len(value) > _SHORT or any(isinstance(one, (Mapping, list, tuple)) for one in value)


def _said(key: str, then: Any, now: Any) -> str:
    """Both values; of long ones, such as paths, the place where they part."""
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
