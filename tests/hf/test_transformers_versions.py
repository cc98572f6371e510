"""An export under the newest release of each major version of transformers: answers with and without the cache are one.

The suite runs on the release of constraints.txt (4.57.6). This file installs another one into a folder of pytest's
cache, once, and runs an export in a process of its own that sees that release and none of our packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import export, recipe

from hola_megatron.hf.auto import load_model

RELEASES = ("5.24.0",)  # besides the one installed; README.md and docs/export.md name the range
# what it needs in other versions than the installed transformers does, and what these need
BESIDES = ("huggingface-hub>=1.31,<3", "tokenizers>=0.23.1,<0.24", "typer")
SCRIPT = """
import sys, warnings
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hola_kernels", "hola_megatron", "megatron"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
warnings.simplefilter("error", FutureWarning)  # two memories at once are told by one
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening
folder, found = sys.argv[1:]
lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
x = torch.arange(80).view(2, 40)
mask = torch.ones(2, 40, dtype=torch.int64)
mask[0, :13] = 0
same = {}
for name, how in {"greedy": {}, "beams": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 7}}.items():
    how = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **how}
    with_cache = lm.generate(x, **how)
    how.pop("prefill_chunk_size", None)
    same[name] = torch.equal(with_cache, lm.generate(x, use_cache=False, **how))
first = lm.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
same["decoding"] = first.shape == (2, 48) and len(first[:, 40:].unique()) > 3
documents = [{"input_ids": list(range(5, 5 + n))} for n in (20, 1, 33)]
batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(documents)
with torch.no_grad():
    alone = torch.cat([lm(torch.tensor([d["input_ids"]])).logits for d in documents], 1)
    packed = lm(**batch).logits
    same["documents"] = torch.allclose(packed, alone, rtol=0, atol=1e-4)
    same["they would leak"] = (lm(batch["input_ids"]).logits - alone).abs().max() > 0.1
    output = lm(x[:, :30], use_cache=True)
    for name in ("past_key_values", "cache"):
        memory = lm(x[:, :30], use_cache=True).past_key_values
        rest = lm(x[:, 30:], **{name: memory}).logits
        same[name] = torch.allclose(rest, lm(x, use_cache=False).logits[:, 30:], rtol=0, atol=1e-4)
try:
    lm(x, some_new_name_of_the_cache=output.past_key_values)
    same["refused"] = False
except TypeError as error:
    same["refused"] = "some_new_name_of_the_cache" in str(error)
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
same["float32 stays"] = {n.rpartition(".")[2] for n, p in half.named_parameters() if p.dtype == torch.float32} == {
    "A_log", "dt_bias", "gamma_q", "gamma_k", "gate", "sink", "route_out", "route_bias"}
held = dict(lm.named_buffers())  # thresholds of ham layers, and how often they were moved
same["thresholds stay"] = len(held) == 2 and all(
    x.dtype == torch.float32 and torch.equal(x, held[n]) for n, x in half.named_buffers())
same["tied"] = lm.lm_head.weight is lm.model.embed_tokens.weight
warnings.simplefilter("default")
lm.train().gradient_checkpointing_enable()
lm(x, labels=x).loss.backward()
same["gradients"] = all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
tokenizer = AutoTokenizer.from_pretrained(folder)
same["tokenizer"] = tokenizer("Ab", add_special_tokens=False)["input_ids"] == [65, 98]
torch.save({"logits": lm.eval()(x).logits.detach(), "generated": first}, found)
print("VERSION", transformers.__version__, "FALSE", sorted(name for name, right in same.items() if not right))
"""


@pytest.mark.parametrize("release", [None, *RELEASES])
def test_an_export_answers_the_same_with_and_without_the_cache(release, tmp_path, pytestconfig):
    folder = export(tmp_path / "out", recipe("hola, gdn, ham, attention", ham={"threshold": 0.4987}))
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if release is not None:
        environment["PYTHONPATH"] = str(installed(release, pytestconfig))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "found.pt")], env=environment,
                          capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"VERSION {release or installed_here()} FALSE []" in done.stdout, done.stdout[-2000:]
    found, here = torch.load(tmp_path / "found.pt"), load_model(folder)
    x = torch.arange(80).view(2, 40)
    torch.testing.assert_close(found["logits"], here(x).logits.detach())
    mask = torch.ones_like(x)
    mask[0, :13] = 0
    assert torch.equal(found["generated"], here.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False,
                                                         eos_token_id=None))


def installed_here() -> str:
    import transformers

    return transformers.__version__


def installed(release: str, pytestconfig: pytest.Config) -> Path:
    """A folder with that release of transformers and what it needs; skips the test where pip cannot get it."""
    folder = Path(pytestconfig.cache.mkdir("transformers")) / release
    if (folder / "complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    for packages in (["--no-deps", f"transformers=={release}"], list(BESIDES)):
        try:
            done = subprocess.run([*pip, *packages], capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            pytest.skip(f"transformers {release} could not be installed: pip took over 600 s")
        if done.returncode:
            pytest.skip(f"transformers {release} could not be installed: {done.stderr.strip().splitlines()[-1][:200]}")
    (folder / "complete").touch()
    return folder
