"""`python -m kd.export`."""

from kd.export import main

main()
