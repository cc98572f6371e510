"""Times one token mixer with its projections, forward and backward, beside flash-linear-attention's layer.

    PYTHONPATH=.:kernels python kernels/benchmarks/bench_layer.py [--peer] [--graph] [--shape B,T,D,H,K] [--gate-only]

Ours is the mixer of a training step as hola_megatron builds it on this machine (Transformer Engine's projections where
it is installed): fused input projection, convolution, state and exact cache, gated norm, output projection; HOLA and
Gated DeltaNet. Theirs is fla.layers.GatedDeltaNet. bfloat16, whole samples packed into one row as in training.
Correctness gate first: output and every gradient against the float32 torch backend, theirs with the same weights too;
nothing is timed where it fails. A gradient may be further off than the limit where that of the plain bfloat16 layer
(torch backend) is too, by a quarter at most and never by twice: the gammas' small sums over all tokens lose digits in
any bfloat16. --graph: as replayed CUDA graphs, without the host.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hola_kernels import PackedDocuments
from hola_megatron.config import Recipe, load_recipe
from hola_megatron.errors import UserError, run_cli
from hola_megatron.layers.documents import Documents
from hola_megatron.model.build import build_model
from hola_megatron.startup.start import start, stop

RECIPE = Path(__file__).parents[2] / "recipes" / "hola_340m.yaml"
SHAPES = ((16, 2048, 1024, 4, 256), (16, 2048, 2048, 8, 256))
OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-2, 4e-2
OF_PLAIN = 1.25  # how much further than the plain layer in bfloat16
# theirs -> the section of our fused projection or convolution
PEER_SECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "g", "b_proj": "b", "a_proj": "a"}

Layer = Callable[[Tensor], Tensor]


class BenchError(UserError):
    """Nothing can be timed here."""


@dataclass(frozen=True)
class Shape:
    """B samples of T tokens, width D, H heads of K (= V)."""

    batch: int
    length: int
    width: int
    heads: int
    head: int

    def __str__(self) -> str:
        return f"B {self.batch}, T {self.length}, width {self.width}, {self.heads} x {self.head}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="also flash-linear-attention's layer")
    parser.add_argument("--shape", action="append", type=sizes, metavar="B,T,D,H,K",
                        help="instead of the standard shapes")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs: the device's time alone")
    parser.add_argument("--gate-only", action="store_true", help="check, and time nothing")
    options = parser.parse_args()
    shapes = [Shape(*size) for size in options.shape or SHAPES]
    if not torch.cuda.is_available():
        raise BenchError("bench_layer: no CUDA device; there is nothing to time")
    if options.peer and importlib.util.find_spec("fla") is None:
        raise BenchError("bench_layer: --peer needs flash-linear-attention; pip install flash-linear-attention==0.6.0")
    start(recipe_of(shapes[0], "G"))
    _print_machine()
    kinds = {"HOLA": "H", "Gated DeltaNet": "G"}
    wrong = [line for shape in shapes for name, kind in kinds.items() for line in gate(shape, kind, "cuda")]
    wrong += [line for shape in shapes for line in (peer_gate(shape) if options.peer else [])]
    if wrong:
        print("nothing timed, the gate fails:", *wrong, sep="\n  ")
        return 1
    print("the gate passes", flush=True)
    if not options.gate_only:
        print("\n| | layer | forward ms | forward + backward ms | peak extra GiB |\n|---|---|---:|---:|---:|")
        for shape in shapes:
            for name, kind in kinds.items():
                layer = ours(build(shape, kind, "cuda"), shape, in_graph=options.graph)
                print(row(shape, f"hola_megatron {name}", layer, graph=options.graph), flush=True)
            if options.peer:
                print(row(shape, "fla Gated DeltaNet", peer(shape), graph=options.graph), flush=True)
    stop()
    return 0


def sizes(text: str) -> tuple[int, ...]:
    found = tuple(int(n) for n in text.split(","))
    if len(found) != 5 or min(found) < 1:
        raise ValueError(text)
    return found


def recipe_of(shape: Shape, kind: str, *overrides: str) -> Recipe:
    """One layer of the 340M recipe at another width."""
    return load_recipe(RECIPE, [
        "model.layers=1", f"model.pattern={kind}", f"model.hidden_size={shape.width}", f"model.heads={shape.heads}",
        f"model.key_dim={shape.head}", f"model.value_dim={shape.head}", "model.vocab_size=256",
        f"train.sequence_length={shape.length}", *overrides])


def build(shape: Shape, kind: str, device: str, *overrides: str) -> nn.Module:
    """The mixer as a training step has it; every parameter has the float32 `main_grad` that data parallelism gives."""
    mixer = build_model(recipe_of(shape, kind, *overrides), device=torch.device(device))[0].decoder.layers[0] \
        .self_attention
    for parameter in mixer.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter, dtype=torch.float32), False
    return mixer


def ours(mixer: nn.Module, shape: Shape, in_graph: bool = False) -> Layer:
    """[B, T, D] -> the same, all samples packed into one row; in_graph: as a graph of training has the documents."""
    cu_seqlens = torch.arange(0, shape.batch * shape.length + 1, shape.length, dtype=torch.int32)
    documents = PackedDocuments(cu_seqlens)
    fixed = cu_seqlens.long().to(next(mixer.parameters()).device)

    def run(x_BTD: Tensor) -> Tensor:
        packed = PackedDocuments(fixed, shape.length) if in_graph else documents
        y, _ = mixer(x_BTD.flatten(0, 1)[:, None], packed_seq_params=Documents.of(packed))
        return y.view_as(x_BTD)

    run.parameters = list(mixer.parameters())
    return run


def peer(shape: Shape, mixer: nn.Module | None = None) -> Layer:
    """Their layer, with the weights of our mixer if one is given."""
    from fla.layers import GatedDeltaNet

    with torch.device("cuda"):
        layer = GatedDeltaNet(hidden_size=shape.width, head_dim=shape.head, num_heads=shape.heads, expand_v=1,
                              conv_size=4, norm_eps=1e-6, layer_idx=0).to(torch.bfloat16).train()
    if mixer is not None:
        _copy_weights(mixer, layer)

    def run(x_BTD: Tensor) -> Tensor:
        return layer(x_BTD)[0]

    run.parameters = list(layer.parameters())
    return run


@torch.no_grad()
def _copy_weights(mixer: nn.Module, layer: nn.Module) -> None:
    rows = [section.rows for section in mixer.in_proj.weight.sections]
    names = [section.name for section in mixer.in_proj.weight.sections]
    projections = dict(zip(names, mixer.in_proj.weight[: sum(rows)].split(rows), strict=True))
    for theirs, name in PEER_SECTIONS.items():
        getattr(layer, theirs).weight.copy_(projections[name])
    for name, weight in zip("qkv", mixer.conv_weight.chunk(3), strict=True):
        getattr(layer, f"{name}_conv1d").weight.copy_(weight[:, None])
    for name in ("A_log", "dt_bias"):
        getattr(layer, name).copy_(getattr(mixer, name))
    layer.o_norm.weight.copy_(mixer.o_norm)
    layer.o_proj.weight.copy_(mixer.out_proj.weight)


def gate(shape: Shape, kind: str, device: str, *overrides: str) -> list[str]:
    """Output and gradients of the bf16 layer that are further from float32 than they may be, at 2 x 700 tokens."""
    short = Shape(2, 700, shape.width, shape.heads, shape.head)
    fast = build(short, kind, device, *overrides)
    slow, plain = (_like(fast, short, kind, device, precision) for precision in ("fp32", "bf16"))
    x, dy = _inputs(short, device)
    expected = _results(slow, short, x.float(), dy.float())
    unavoidable = errors(_results(plain, short, x, dy), expected)
    return [f"{shape}, pattern {kind}: {line}"
            for line in differences(_results(fast, short, x, dy), expected, unavoidable)]


def peer_gate(shape: Shape) -> list[str]:
    """The same for their layer, with our weights: output and the gradient of its input."""
    short = Shape(2, 700, shape.width, shape.heads, shape.head)
    fast = build(short, "G", "cuda")
    slow = _like(fast, short, "G", "cuda")
    (x, dy), layer = _inputs(short, "cuda"), peer(short, fast)
    x = x.requires_grad_()
    y = layer(x)
    found = {"output": y.detach(), "d input": torch.autograd.grad(y, x, dy)[0]}
    return [f"{shape}, fla: {line}"
            for line in differences(found, _results(slow, short, x.detach().float(), dy.float()))]


def _like(fast: nn.Module, shape: Shape, kind: str, device: str, precision: str = "fp32") -> nn.Module:
    """The plain layer with the same weights."""
    slow = build(shape, kind, device, "model.backend=torch", "model.layer_spec=local", f"train.precision={precision}")
    have = dict(fast.named_parameters())
    with torch.no_grad():
        for name, parameter in slow.named_parameters():
            parameter.copy_(have[name][: parameter.shape[0]])
    return slow


def _inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length, shape.width)
    return tuple(torch.randn(*size, generator=g).to(device, torch.bfloat16) for _ in range(2))


def _results(mixer: nn.Module, shape: Shape, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = ours(mixer, shape)(x)
    y.backward(dy)
    found = {"output": y.detach(), "d input": x.grad}
    for name, parameter in mixer.named_parameters():
        # Transformer Engine adds a weight's gradient to main_grad and leaves a stand-in
        found[f"d {name}"] = parameter.main_grad if parameter.grad_added_to_main_grad else parameter.grad
    return found


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The norm of each difference over the norm of what is expected; rows after it (padding) are left out."""
    exact = {name: y.double() for name, y in expected.items()}
    return {name: float((x[: exact[name].shape[0]].double() - exact[name]).norm() / exact[name].norm().clamp_min(1e-30))
            for name, x in found.items()}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor],
                unavoidable: dict[str, float] | None = None) -> list[str]:
    """What lies further apart than it may."""
    wrong = []
    for name, error in errors(found, expected).items():
        limit = OUTPUT_LIMIT if name == "output" else GRADIENT_LIMIT
        limit = max(limit, min(OF_PLAIN * (unavoidable or {}).get(name, 0.0), 2 * limit))
        if not error <= limit:
            wrong.append(f"{name} {error:.1e}, allowed {limit:.1e}")
    return wrong


def row(shape: Shape, name: str, layer: Layer, *, graph: bool) -> str:
    from timing import milliseconds  # beside this file, where a program finds it

    x, dy = _inputs(shape, "cuda")
    x = x.requires_grad_()
    cleared = [x, *layer.parameters]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    def both() -> None:
        layer(x).backward(dy)

    both()  # compiles
    for tensor in cleared:
        tensor.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    one = milliseconds(forward, graph=graph, rep=300)
    two = milliseconds(both, graph=graph, rep=300, grad_to_none=cleared)
    return f"| {shape} | {name} | {one:.3f} | {two:.3f} | {peak:.2f} |"


def _print_machine() -> None:
    import triton

    from hola_megatron.log.console import code_version
    from hola_megatron.model.config import choose_spec

    kind, why = choose_spec(recipe_of(Shape(*SHAPES[0]), "G").model)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {code_version()}, "
          f"projections: {kind} ({why})\n", flush=True)


if __name__ == "__main__":
    run_cli(main)
