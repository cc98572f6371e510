"""The whole path on one machine, in minutes: what `make demo` runs.

Text -> MDS -> hola_tiny trained on two processes -> killed on purpose and resumed ->
the same weights, bit for bit -> Hugging Face export -> perplexity and generated text.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import resources
from pathlib import Path

from hola_megatron.arguments import Parser
from hola_megatron.checkpoint.folder import open_checkpoint
from hola_megatron.errors import RecipeError, UserError, run_cli
from hola_megatron.files.ownership import beside, owned
from hola_megatron.log.metrics import drop_rows_after, read_rows
from hola_megatron.paths import output

RECIPE = "recipes/hola_tiny.yaml"
RANKS = 2
MARKER = "made_by_demo"  # a folder without it is somebody's own


class DemoError(UserError):
    """A part of the demo did not do what it should."""


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=output("--folder"), default=Path("runs/demo"),
                        help="output folder; created again")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the recipe")
    args = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // RANKS)))
    began = time.monotonic()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with owned(beside(args.folder, "wait for its end, or choose another --folder")):
        make_anew(args.folder)
        Demo(args.folder, args.overrides).run()
    print(f"\ndemo finished in {(time.monotonic() - began) / 60:.1f} minutes")


def make_anew(folder: Path) -> None:
    """An empty folder, replacing an earlier demo's. Raises RecipeError for any other folder."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
            raise RecipeError(f"--folder: {folder} exists and was not made by this tool ({MARKER} is not there), so it "
                              "is not removed; choose another name")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


class Demo:
    """The steps, in order; each prints what it does and where the result is."""

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder, self.overrides = folder, overrides
        self.data, self.whole, self.broken = folder / "data", folder / "run", folder / "run-killed-and-resumed"
        self.export = folder / "hf"

    def run(self) -> None:
        self.prepare()
        self.train()
        self.kill_and_resume()
        self.use_it()
        self.say_where()

    def prepare(self) -> None:
        heading("1. text to MDS shards (Shakespeare, bytes as tokens)")
        for part in ("train", "valid"):
            tail = ["--keep-tail"] if part == "valid" else []
            python("tools/prepare_data.py", "--bundled", part, "--tokenizer", "bytes", "--sequence-length", "256",
                   "--out", str(self.data / part), *tail)

    def train(self) -> None:
        heading(f"2. train hola_tiny on {RANKS} processes")
        self.check(self.start_training(self.whole).wait() == 0, "training failed")

    def kill_and_resume(self) -> None:
        heading("3. the same run, killed (SIGKILL) after its second checkpoint, and started again")
        steps = sorted((self.whole / "checkpoints").iterdir())
        self.check(len(steps) >= 2, "the run has fewer than two checkpoints")
        shutil.copytree(self.whole, self.broken)
        last, before = steps[-1].name, steps[-2].name
        shutil.rmtree(self.broken / "checkpoints" / last)
        drop_rows_after(self.broken / "metrics.jsonl", open_checkpoint(steps[-2]).step)
        target = (open_checkpoint(steps[-2]).step + open_checkpoint(steps[-1]).step) // 2
        process = self.start_training(self.broken, quiet=True)
        while process.poll() is None and last_step(self.broken) < target:
            time.sleep(0.1)
        self.check(process.poll() is None, "the run ended before it could be killed")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"went on from {before}, killed after step {last_step(self.broken)}; starting it again")
        self.check(self.start_training(self.broken, quiet=True).wait() == 0,
                   f"the resumed run failed, see {self.broken.with_suffix('.log')}")
        losses = [final_loss(run) for run in (self.whole, self.broken)]
        files = [{name: about["sha256"] for name, about in open_checkpoint(run / "checkpoints" / last).manifest[
            "files"].items()} for run in (self.whole, self.broken)]
        print(f"final loss without a stop {losses[0]!r}, killed and resumed {losses[1]!r}; checkpoint files "
              f"{'identical' if files[0] == files[1] else 'DIFFERENT'}")
        self.check(losses[0] == losses[1] and files[0] == files[1], "the resumed run is not the same run")

    def use_it(self) -> None:
        heading("4. export to Hugging Face, checked by logits")
        python("tools/convert.py", "to-hf", str(self.whole), str(self.export))
        heading("5. perplexity of held-out text, with the export")
        text = self.data / "valid.txt"
        text.write_text(held_out_text(), encoding="utf-8")
        python("tools/evaluate.py", str(self.export), "--text", str(text))
        heading("6. generate with transformers alone")
        print(generate(self.export))

    def say_where(self) -> None:
        heading("where things are")
        entropy = unigram_entropy()
        loss = [row["loss"] for row in read_rows(self.whole / "metrics.jsonl") if row["kind"] == "valid"][-1]
        rows = {"data": self.data, "run (checkpoints, metrics.jsonl, TensorBoard)": self.whole,
                "picture of the loss": self.whole / "loss.png", "Hugging Face model": self.export}
        for name, path in rows.items():
            self.check(path.exists(), f"{path} is missing")
            print(f"{name:>48}  {path}")
        print(f"\nvalidation loss {loss:.3f} nats a byte; bytes drawn by frequency alone: {entropy:.3f}")
        self.check(loss < entropy - 0.5, "the model has not learnt more than byte frequencies")

    def start_training(self, run: Path, quiet: bool = False) -> subprocess.Popen:
        command = [sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", str(RANKS), "-m",
                   "hola_megatron.train", RECIPE, f"run_dir={run}", f"data.train={self.data / 'train'}",
                   f"data.valid={self.data / 'valid'}", *self.overrides]
        if not quiet:
            return subprocess.Popen(command, start_new_session=True)
        # surviving ranks of a killed run print many lines about their lost peers
        with run.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def check(self, fine: bool, problem: str) -> None:
        if not fine:
            raise DemoError(f"demo: {problem}; what it wrote is in {self.folder}")


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode:
        raise DemoError(f"demo: {' '.join(arguments)} ended with code {done.returncode}")


def bundled_text() -> str:
    packed = resources.files("hola_megatron.data").joinpath("bundled/shakespeare.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")


def held_out_text() -> str:
    """The last 2 % of the bundled text, which is inside the held-out part."""
    text = bundled_text()
    return text[-len(text) // 50:]


def unigram_entropy() -> float:
    """Nats a byte of the text when bytes are drawn by their frequency alone."""
    data = bundled_text().encode("utf-8")
    return -sum(n / len(data) * math.log(n / len(data)) for n in Counter(data).values())


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"), default=0)


def final_loss(run: Path) -> float:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"][-1]


def generate(export: Path) -> str:
    """Continue a prompt in a process that never imports this project."""
    program = (
        "import sys, json, torch, transformers\n"
        "transformers.logging.set_verbosity_error()\n"
        "path = sys.argv[1]\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(path)\n"
        "torch.manual_seed(0)\n"
        "ids = tokenizer('ROMEO:', return_tensors='pt').input_ids\n"
        "out = model.generate(ids, max_new_tokens=200, do_sample=True, temperature=0.7)\n"
        "print(json.dumps(tokenizer.decode(out[0], skip_special_tokens=True)))\n")
    done = subprocess.run([sys.executable, "-c", program, str(export.resolve())], capture_output=True, text=True,
                          check=False, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    if done.returncode:
        raise DemoError(f"demo: generation failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    run_cli(main)
