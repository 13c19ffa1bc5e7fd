"""What all the runs of a runs_dir say, from their records alone: `python -m kd.report`."""
