"""`vssl`: one command for all that a user does.  Its words are read before anything heavy is
imported, so that help and a typo cost no more than a blink."""

from __future__ import annotations


def main() -> int:
    """Run the script ``vssl``; returns its exit code."""
    from vssl_dist.installed import require_packages

    require_packages()
    from vssl_dist.cli.program import vssl

    return vssl()
