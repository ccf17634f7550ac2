"""``python -m vssl_dist.linter`` prints the rules as Markdown."""

from __future__ import annotations

from vssl_dist.linter import RULES
from vssl_dist.text import say


def table() -> str:
    """Every rule: its name, the mistake, who has met it."""
    lines = ["| warning | mistake | evidence |", "|---|---|---|"]
    for rule in RULES:
        mistake = (rule.check.__doc__ or "").partition("\n")[0].rstrip(".")
        lines.append(f"| `{rule.name}` | {mistake} | {rule.evidence} |")
    return "\n".join(lines)


if __name__ == "__main__":
    say(*table().splitlines())
