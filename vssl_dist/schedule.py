"""Schedules as pure functions of the step: nothing to save, nothing to replay on resume."""

from math import cos, pi


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``total``, ``end`` afterwards.

    Args:
        step: Optimizer steps done.
        total: Optimizer steps of the whole schedule; at most 0 means "already over".
        start: Value at step 0.
        end: Value at step ``total``.

    >>> [round(cosine(s, 4, 0.99, 1.0), 4) for s in range(5)]
    [0.99, 0.9915, 0.995, 0.9985, 1.0]
    """
    if total <= 0:
        return end
    t = min(max(step / total, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + cos(pi * t))


def warmup_cosine(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear from 0 to ``peak`` over ``warmup`` steps, then cosine to zero.

    >>> [round(warmup_cosine(s, 6, 2, 1.0), 3) for s in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, total - warmup, peak, 0.0)
