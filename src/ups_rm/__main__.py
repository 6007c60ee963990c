"""`python -m ups_rm ...` is `ups-rm ...`."""

from ups_rm.cli import main

main()
