"""Studies: many small runs of one question, and one report.

    table.py        the YAML file of a study: arms (recipes with overrides) x seeds, decision rules
    far_mqar.py     the generated recall task of recipes/studies/far_mqar.yaml
    task_run.py     one run on a generated task, through the engine of the trainer
    recipe_run.py   one run of the trainer on a recipe's own data, and the commands after it
    runs.py         run folders: finished, failed, locked
    worker.py       a process that takes runs until none is left
    start.py        workers on this machine's CPUs or GPUs, or a Slurm array
    intervals.py    Student's t over seeds
    rules.py        decision rules, written before the runs
    curves.py, report.py    pictures and the Markdown report

The program is tools/experiment.py.
"""
