"""``python -m vssl_dist.cli`` is ``vssl``."""

from __future__ import annotations

import sys

from vssl_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
