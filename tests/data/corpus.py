"""Documents to prepare, and the command-line tool."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "with", "his", "which", "one"]


def make_documents(count: int, longest: int = 60, seed: int = 0) -> list[str]:
    """Documents of 1 to `longest` words, accents and line ends among them."""
    rng = random.Random(seed)
    extra = ["é中🙂", "\n\n", "  two  blanks ", "3.14", "x\u2028y"]
    return [" ".join(rng.choices(WORDS + extra, k=rng.randint(1, longest))) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)), encoding="utf-8")
    return path


def forked(function, *arguments) -> multiprocessing.Process:
    """A started process that runs `function`; forked, so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run tools/prepare_data.py to its end."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
