"""`python -m pdctl.proxy`: see main.py. What it imports takes memory, so another process is made first."""

from __future__ import annotations

import sys

from pdctl.proxy.takeover.sharer import share_descriptors

if __name__ == "__main__":
    share_descriptors()
    from pdctl.proxy.main import main

    sys.exit(main())
