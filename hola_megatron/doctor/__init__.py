"""Checks whether this installation can train. Implements tools/doctor.py.

    facts.py        versions and devices, read without importing the packages where that is possible
    known_bad.py    combinations that are known to break, each with its fix
    components.py   the implementation of each accelerated component here, and why
    checks.py       small runs: kernels against their definition, collectives, the disk of run folders
    nodes.py        several nodes for one run: what they have is compared through the launcher's store, then measured
    between.py      clocks, and all-reduces of every pair of nodes
    node_table.py   the table of nodes, and a line for each problem
"""
