"""Warnings before a run about mistakes that nothing else would ever report.

They cost points, not crashes: each rule is a small pure function of the configuration and names
who has met the mistake.  A warning never stops a run; ``silence: [NAME]`` hides one.
"""

from __future__ import annotations

import difflib

from vssl_dist.config import RunConfig
from vssl_dist.errors import ConfigError
from vssl_dist.linter import methods, optimisation, running, views
from vssl_dist.linter.rule import Facts, Finding, Rule

__all__ = ["RULES", "Facts", "Finding", "Rule", "lint"]

RULES: tuple[Rule, ...] = (
    *optimisation.RULES,
    *methods.RULES,
    *views.RULES,
    *running.RULES,
)
"""All rules, in the order in which they are reported."""
_BECAME_REFUSALS = ("strangers", "unlabelled_bank")
"""Rules of earlier versions that a config may still silence, to no effect."""


def lint(cfg: RunConfig, facts: Facts) -> list[Finding]:
    """The rules that fire on a run and are not silenced.

    Args:
        cfg: The run.
        facts: Facts besides the configuration; rules that need one that is missing keep quiet.

    Raises:
        ConfigError: ``silence`` names no rule.
    """
    names = [rule.name for rule in RULES]
    for name in cfg.silence:
        if name not in (*names, *_BECAME_REFUSALS):
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"has: {', '.join(names)}"
            raise ConfigError(f"silence: no such warning as {name!r} ({hint})")
    active = [rule for rule in RULES if rule.name not in cfg.silence]
    messages = ((rule, rule.check(cfg, facts)) for rule in active)
    return [Finding(rule, message) for rule, message in messages if message]
