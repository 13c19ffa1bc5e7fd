"""`python -m kd.check`."""

from kd.check import main

main()
