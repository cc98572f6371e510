"""Combinations of packages that are known to break, each by name with its fix.

"bad" does not work here, or computes wrong numbers; "note" works with a limit worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hola_megatron.doctor.facts import Facts

# what PyTorch's wheels are built for
TRITON_OF_TORCH = {(2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7), (2, 14): (3, 8), (2, 15): (3, 9)}
# every kernel was run against float64 on a Hopper GPU with these (`python -m hola_kernels.verify`)
CHECKED_TRITON = ((3, 6, 0), (3, 7, 1))


@dataclass(frozen=True)
class Finding:
    """level: "bad" or "note"."""

    level: str
    name: str
    what: str
    fix: str


def find_known_bad(facts: Facts) -> list[Finding]:
    """Everything that applies, bad ones first."""
    found = [finding for rule in RULES if (finding := rule(facts))]
    return sorted(found, key=lambda finding: finding.level != "bad")


def old_python(facts: Facts) -> Finding | None:
    """A Python that is too old for Megatron-core."""
    if facts.python >= (3, 12):
        return None
    found = ".".join(map(str, facts.python))
    return Finding("bad", "python", f"Python {found}: Megatron-core 0.17 and later need 3.12",
                   "use Python 3.12 or newer")


def wrong_apex(facts: Facts) -> Finding | None:
    """PyPI's apex, which is not NVIDIA's."""
    if facts.apex_optimizers is not False:
        return None
    return Finding("bad", "apex", "PyPI's `apex` is another project (a Pyramid toolkit), and Megatron-core takes it "
                   "for NVIDIA's", "pip uninstall apex; nothing here needs apex in addition to Transformer Engine")


def engine_does_not_load(facts: Facts) -> Finding | None:
    """An installed Transformer Engine that cannot be imported."""
    error = facts.load_errors.get("transformer-engine")
    if error is None:
        return None
    missing = error.startswith("ModuleNotFoundError")  # all that megatron-core expects of a broken one
    then = "Megatron would do without it" if missing else "megatron-core does not load with it"
    return Finding("bad", "transformer-engine", f"installed, but does not load ({error}): {then}",
                   "see the other findings; or uninstall it")


def engine_and_cublas(facts: Facts) -> Finding | None:
    """A Transformer Engine that needs an older cuBLAS."""
    engine, cublas = facts.version("transformer-engine"), facts.cublas
    if not engine or not cublas or not (2, 13) <= engine < (2, 17) or not (13, 0) <= cublas < (13, 2, 0, 9):
        return None
    return Finding("bad", "transformer-engine and cuBLAS", f"Transformer Engine {facts.packages['transformer-engine']} "
                   "(2.13 to 2.16) wants a symbol that cuBLAS has from 13.2.0.9 on: undefined symbol at import",
                   "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]>=2.17'")


def engine_parts(facts: Facts) -> Finding | None:
    """Packages of Transformer Engine with different versions."""
    parts = {name: text.partition("+")[0] for name, text in facts.packages.items()
             if name.startswith("transformer-engine")}
    if len(set(parts.values())) <= 1:
        return None
    found = ", ".join(f"{name} {text}" for name, text in parts.items())
    return Finding("bad", "transformer-engine's parts", f"{found}: all must be of one version",
                   "reinstall them together: pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]'")


def engine_and_cuda(facts: Facts) -> Finding | None:
    """A Transformer Engine for another CUDA than torch's."""
    if not facts.cuda:
        return None
    major = facts.cuda.partition(".")[0]
    other = {"12": "13", "13": "12"}.get(major)
    if f"transformer-engine-cu{other}" not in facts.packages or f"transformer-engine-cu{major}" in facts.packages:
        return None
    return Finding("bad", "transformer-engine and CUDA", f"torch is built for CUDA {facts.cuda}, Transformer Engine "
                   f"for CUDA {other}", f"install transformer-engine[pytorch,core_cu{major}]")


def torch_without_gpu(facts: Facts) -> Finding | None:
    """A torch without CUDA on a machine with a GPU."""
    if not facts.gpu_file or facts.devices:
        return None
    if facts.cuda is None:
        return Finding("bad", "torch", f"torch {facts.packages['torch']} is a CPU build on a machine with a GPU",
                       "install a CUDA build of torch")
    return Finding("bad", "torch and the driver", f"torch is built for CUDA {facts.cuda} and cannot use the GPU: the "
                   "driver is older than that, or CUDA_VISIBLE_DEVICES hides it",
                   "compare with nvidia-smi's CUDA version: update the driver, or install torch for that version")


def torchvision_build(facts: Facts) -> Finding | None:
    """A torchvision of another build than torch."""
    torch, vision = facts.packages.get("torch", ""), facts.packages.get("torchvision")
    if vision is None or facts.cuda is not None or "+cpu" in vision or "mosaicml-streaming" not in facts.packages:
        return None
    return Finding("bad", "torchvision", f"torchvision {vision} is a CUDA build with torch {torch}: "
                   "`import streaming` ends with 'operator torchvision::nms does not exist'",
                   "install the +cpu build of torchvision")


def triton_on_hopper(facts: Facts) -> Finding | None:
    """Triton versions that miscompile on Hopper."""
    triton = facts.version("triton")
    if triton is None or facts.capability is None or facts.capability[0] != 9:
        return None
    found = facts.packages["triton"]
    if triton in CHECKED_TRITON:
        if triton >= (3, 7, 1):
            return None
        return Finding("note", "triton on Hopper", f"Triton {found} miscompiles some 64-wide products on Hopper; the "
                       "kernels here avoid them and were checked with it", "nothing to do; 3.7.1 is free of it")
    if (3, 4) <= triton < (3, 7, 1):
        return Finding("bad", "triton on Hopper", f"Triton {found} (3.4 to 3.7.0) miscompiles some 64-wide products on "
                       "Hopper, in silence, and the kernels here were not checked with it",
                       "install Triton 3.6.0 or 3.7.1 (checked)")
    return Finding("note", "triton", f"the kernels were checked with Triton 3.6.0 and 3.7.1, not with {found}",
                   "run python -m hola_kernels.verify once on this GPU")


def old_triton(facts: Facts) -> Finding | None:
    """A Triton that is too old."""
    triton = facts.version("triton")
    if triton is None or triton >= (3, 6):
        return None
    found = facts.packages["triton"]
    return Finding("bad", "triton", f"Triton {found} is older than 3.6", "install Triton 3.6 or newer")


def triton_and_torch(facts: Facts) -> Finding | None:
    """A Triton of another version than torch was built with."""
    torch, triton = facts.version("torch"), facts.version("triton")
    wanted = TRITON_OF_TORCH.get(torch[:2]) if torch else None
    if wanted is None or triton is None or triton[:2] == wanted:
        return None
    return Finding("note", "triton and torch", f"torch {facts.packages['torch']} was built with Triton "
                   f"{wanted[0]}.{wanted[1]}, installed is {facts.packages['triton']}: torch.compile may fail",
                   f"pip install 'triton=={wanted[0]}.{wanted[1]}.*'")


def interpreter_and_numpy(facts: Facts) -> Finding | None:
    """A numpy on which Triton's interpreter fails."""
    triton, numpy = facts.version("triton"), facts.version("numpy")
    if triton is None or numpy is None or triton[:2] != (3, 6) or numpy < (2, 4):
        return None
    return Finding("note", "triton and numpy", f"Triton {facts.packages['triton']}'s interpreter breaks with numpy "
                   f"{facts.packages['numpy']} (kernel tests on the CPU only)", "pip install 'numpy<2.4'")


def megatron_version(facts: Facts) -> Finding | None:
    """A Megatron-core of another version than the one supported."""
    megatron = facts.version("megatron-core")
    if megatron is not None and (0, 19) <= megatron < (0, 20):
        return None
    found = facts.packages.get("megatron-core", "none")
    return Finding("bad", "megatron-core", f"megatron-core {found}: the stack is written for 0.19",
                   "pip install 'megatron-core>=0.19,<0.20', without its extra [dev]")


def cudnn_frontend(facts: Facts) -> Finding | None:
    """A cudnn-frontend that is too old for Transformer Engine."""
    engine, frontend = facts.version("transformer-engine"), facts.version("nvidia-cudnn-frontend")
    if engine is None or frontend is None:
        return None
    least = next((least for since, least in (((2, 20), (1, 29)), ((2, 19), (1, 28)), ((2, 18), (1, 25)))
                  if engine >= since), (0,))
    if frontend >= least:
        return None
    older, wants = facts.packages["nvidia-cudnn-frontend"], facts.packages["transformer-engine"]
    return Finding("note", "cudnn-frontend", f"nvidia-cudnn-frontend {older} is older than Transformer Engine {wants} "
                   "wants (megatron-core[dev] pins 1.26)",
                   f"pip install 'nvidia-cudnn-frontend>={'.'.join(map(str, least))}'")


def two_cudnn(facts: Facts) -> Finding | None:
    """A second cuDNN that torch cannot use."""
    error = facts.load_errors.get("cudnn")
    if error is None:
        return None
    return Finding("note", "cudnn", f"torch cannot use its cuDNN together with the one already loaded ({error}); "
                   "here only softmax attention may ask torch for it",
                   "let the loader find torch's own first (LD_LIBRARY_PATH), or remove the system's")


def streaming_pins(facts: Facts) -> Finding | None:
    """Packages outside of mosaicml-streaming's declared versions."""
    transformers, numpy = facts.version("transformers"), facts.version("numpy")
    if "mosaicml-streaming" not in facts.packages:
        return None
    outside = [f"{name} {facts.packages[name]}" for name, version, limit in (
        ("transformers", transformers, (5,)), ("numpy", numpy, (2, 2))) if version is not None and version >= limit]
    if not outside:
        return None
    return Finding("note", "mosaicml-streaming", f"it declares transformers<5 and numpy<2.2, here are "
                   f"{', '.join(outside)}; reading and writing MDS works with them",
                   "nothing to do, though `pip check` complains")


RULES: tuple[Callable[[Facts], Finding | None], ...] = (
    old_python, wrong_apex, engine_does_not_load, engine_and_cublas, engine_parts, engine_and_cuda, torch_without_gpu,
    torchvision_build, old_triton, triton_on_hopper, triton_and_torch, interpreter_and_numpy, megatron_version,
    cudnn_frontend, two_cudnn, streaming_pins)
