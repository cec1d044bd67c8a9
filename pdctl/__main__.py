"""`python -m pdctl` is `pdctl`."""

from pdctl.cli import main

main()
