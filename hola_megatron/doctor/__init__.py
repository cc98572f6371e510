"""Whether this installation can train, on one screen. Behind tools/doctor.py.

    facts.py        versions and devices, read without importing the packages where that is possible
    known_bad.py    combinations that are known to break, each with its fix
    pieces.py       which implementation provides each accelerated piece here, and why
    checks.py       small runs: kernels against their definition, collectives, the disk of run folders
"""
