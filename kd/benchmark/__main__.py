"""`python -m kd.benchmark`."""

from kd.benchmark import main

main()
