"""How long a lost rank goes unnoticed: seconds from the fault to the launcher's end, by kind. Prints a Markdown table.

    python tests/train/measure_lost.py DATA [HANG_SECONDS]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers import ROOT, write_recipe


def seconds_of(fault: str, data: Path, hang_seconds: float) -> tuple[int, float]:
    """(exit code, seconds after the last step before the fault)."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        recipe = write_recipe(Path(folder) / "recipe.yaml", data, run_dir=str(run), train__steps=50,
                              parallel__hang_seconds=hang_seconds, checkpoint__every=2)
        code = subprocess.run([sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", "2",
                               "tests/train/faults.py", fault, str(recipe)], cwd=ROOT, check=False).returncode
        return code, time.time() - (run / "metrics.jsonl").stat().st_mtime


if __name__ == "__main__":
    data, limit = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 20.0
    print("| rank 1 of 2 | exit code | seconds | beyond hang_seconds |\n| --- | --- | --- | --- |")
    for fault, of_limit in (("die", False), ("hang", True), ("stopped", True)):
        code, seconds = seconds_of(f"{fault}@4@1", data, limit)
        print(f"| {fault} | {code} | {seconds:.1f} | {f'{seconds - limit:.1f}' if of_limit else ''} |", flush=True)
