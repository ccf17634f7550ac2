"""The door to `make quickstart`; the code is vssl_dist/commands/quickstart.py."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()
    from vssl_dist.commands import quickstart

    sys.exit(quickstart.main())
