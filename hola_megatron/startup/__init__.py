"""Start-up: read the environment, compare the ranks, build the process groups."""
