"""Arguments of every public operation: wrong ones are named in one line, odd but valid ones are right."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from inputs import relative_error
from interpreted import INTERPRETED

from hola_kernels import (
    HolaState,
    KernelError,
    cache_ages,
    entering_gradient,
    exact_read,
    exact_read_only,
    gated_delta_rule,
    gated_delta_step,
    gated_rms_norm,
    hola_attention,
    hola_attention_step,
    kept_attention,
    read_mass,
    select_cache,
    short_conv,
    short_conv_step,
    state_map,
)
from hola_kernels.cross_entropy import IGNORE_INDEX, cross_entropy_, cross_entropy_gradient_, softmax_statistics
from hola_kernels.gates import decay_and_strength
from hola_kernels.rms_norm import rms_norm
from hola_kernels.swiglu import swiglu
from hola_kernels.verify_cases import attention_inputs

BACKENDS = ["triton"] if INTERPRETED else ["reference", "torch"]
SIZES = {"block": 16, "slots": 4}
B, T, H, K = 2, 24, 2, 64


def tensors(rows: int = B, length: int = T) -> dict[str, torch.Tensor]:
    if rows * length:
        return {n: x.detach() for n, x in attention_inputs(rows, length, H, K, K, torch.float32, 0, "cpu").items()}
    made = tensors(1, 1)
    return {n: x.new_zeros(rows, length, *x.shape[2:]) if x.ndim > 2 else x for n, x in made.items()}


def operations(rows: int = B, length: int = T) -> dict[str, tuple]:
    """Name -> (function, its tensor arguments, other arguments); what it returns first is a tensor."""
    x = tensors(rows, length)
    tokens = {n: x[n] for n in ("q", "k", "v", "log_decay", "beta")}
    read = {**{n: x[n] for n in ("q", "k", "v", "gamma_q", "gamma_k", "sink")}, "score": x["beta"]}
    flat = x["q"].flatten(2)
    weight = torch.randn(H * K, 4, generator=torch.Generator().manual_seed(3))
    A_log, projected = torch.tensor([0.5, 0.1]), torch.cat([x["log_decay"], x["beta"]], -1)
    return {
        "hola_attention": (hola_attention, x, SIZES),
        "gated_delta_rule": (gated_delta_rule, tokens | {"initial_state": torch.randn(rows, H, K, K)}, {}),
        "exact_read": (exact_read, read, SIZES), "exact_read_only": (exact_read_only, read, SIZES),
        "kept_attention": (kept_attention, {**{n: x[n] for n in ("q", "k", "v", "sink")}, "log_weight": x["log_decay"]},
                           {"keep": x["beta"] > 0.5}),
        "state_map": (state_map, {n: tokens[n] for n in ("k", "v", "log_decay", "beta")}, {}),
        "entering_gradient": (entering_gradient, {**{n: tokens[n] for n in ("q", "k", "log_decay", "beta")},
                                                  "do": tokens["v"]}, {}),
        "short_conv": (short_conv, {"x": flat, "weight": weight, "tail": torch.randn(rows, 3, H * K)}, {}),
        "gated_rms_norm": (gated_rms_norm, {"x": x["q"], "gate": x["k"], "weight": x["gamma_q"]}, {}),
        "rms_norm": (rms_norm, {"x": x["q"], "weight": x["gamma_q"]}, {}),
        "swiglu": (swiglu, {"x": flat}, {}),
        "gates": (decay_and_strength, {"x": projected, "A_log": A_log, "dt_bias": A_log}, {"heads": H})}


def first(result):
    return result[0] if isinstance(result, tuple) else result


NAMES = tuple(operations())
WHOLE = [(name, argument) for name, (_, given, _) in operations().items() for argument in given]
REFUSED = {"an axis too few": lambda x: x.flatten(0, 1) if x.ndim > 1 else x[0], "an axis too many": lambda x: x[None],
           "a number too few": lambda x: x[..., :-1], "a number too many": lambda x: torch.cat([x, x[..., :1]], -1),
           "integers": lambda x: x.long(), "complex": lambda x: x.to(torch.complex64),
           "another device": lambda x: x.to("meta"), "sparse": lambda x: x.to_sparse()}


AXES, WIDTHS = ("an axis too few", "an axis too many"), ("a number too few", "a number too many")
ANY = {("rms_norm", "x"): AXES, ("gated_rms_norm", "x"): (), ("swiglu", "x"): (*AXES, "another device"),
       ("gates", "x"): (*AXES, "a number too many"),  # columns after theirs
       **{(name, "v"): WIDTHS for name in ("hola_attention", "exact_read", "exact_read_only", "kept_attention",
                                           "state_map")},
       ("state_map", "k"): WIDTHS, ("entering_gradient", "do"): WIDTHS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "argument"), WHOLE)
def test_wrong_tensors_are_named(name, argument, backend):
    function, given, options = operations()[name]
    for what, spoil in REFUSED.items():
        if what in ANY.get((name, argument), ()):
            continue
        with pytest.raises(KernelError) as error:
            function(**{**given, argument: spoil(given[argument])}, **options, backend=backend)
        assert "\n" not in str(error.value), what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_strided_and_expanded_arguments_are_the_same_numbers(name, backend):
    """Every tensor with strides of its own; the vectors also as one number seen many times."""
    function, given, options = operations()[name]

    def apart(x):
        spaced = torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan)
        spaced[..., ::3] = x
        return spaced[..., ::3]

    expected = run(function, given, options, backend)
    found = run(function, {n: apart(x) for n, x in given.items()}, options, backend)
    # the same sums, perhaps in another order
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))
    for argument in ("gamma_q", "gamma_k", "gate", "sink", "A_log", "dt_bias"):
        if argument in given and given[argument].ndim == 1:
            one = given[argument][:1]
            pair = [run(function, {**given, argument: x}, options, backend)
                    for x in (one.expand(given[argument].shape), one.repeat(given[argument].numel()))]
            assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True)), argument


def run(function, given, options, backend):
    """The output and, where there are any, gradients."""
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    y = first(function(**leaves, **options, backend=backend))
    if not y.requires_grad:
        return [y]
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "length"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_at_all(name, rows, length, backend):
    """No rows, or rows without tokens: shapes as ever, and gradients of zero."""
    function, given, options = operations(rows, length)[name]
    _, one, of_one = operations(1, 1)[name]
    shape = first(function(**one, **of_one, backend=backend)).shape
    y = first(function(**given, **options, backend=backend))
    assert y.shape[0] == rows and y.shape[2:] == shape[2:]
    leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
    y = first(function(**leaves, **options, backend=backend))
    if y.requires_grad:
        found = torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True)
        assert not any(g.any() for g in found if g is not None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, backend):
    function, given, options = operations()[name]
    expected = run(function, given, options, backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = first(function(**given, **options, backend=backend))
    assert y.dtype == torch.float32 and torch.equal(y, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("state_map", "entering_gradient")])
def test_a_second_derivative_is_right_or_an_error(name, backend):
    """Never zero without a word."""
    function, given, options = operations(1, 9)[name]
    argument = next(n for n in ("v", "x") if n in given)

    def slope(x, power=2):
        leaf = x.clone().requires_grad_()
        y = first(function(**{**given, argument: leaf}, **options, backend=backend))
        return leaf, torch.autograd.grad((y**power).sum(), leaf, create_graph=True)[0]

    if backend == "triton":
        for power in (1, 2):  # a gradient that comes in as a number, and one with a gradient of its own
            for ask in (torch.autograd.grad, lambda y, leaf: torch.autograd.grad(y + leaf.sum(), leaf),
                        lambda y, _: y.backward()):
                leaf, gradient = slope(given[argument], power)
                with pytest.raises(RuntimeError, match="once differentiable"):
                    ask(gradient.square().sum(), leaf)
        return
    double = {n: x.double() for n, x in given.items()}
    given = double
    leaf, gradient = slope(double[argument])
    found = torch.autograd.grad(gradient.square().sum(), leaf)[0]
    step = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    plus, minus = (slope(double[argument] + sign * step)[1].square().sum().item() for sign in (1, -1))
    assert (plus - minus) / 2 == pytest.approx((found * step).sum().item(), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [3e38, -3e38, float("-inf")])
def test_sinks_of_any_size(sink, backend):
    x = {n: tensors()[n] for n in ("q", "k", "v", "gamma_q", "gamma_k")} | {"sink": torch.full((H,), sink)}
    x["score"] = tensors()["beta"]
    found = run(exact_read, x, SIZES, backend)
    expected = run(exact_read, {n: v.double() for n, v in x.items()}, SIZES, "torch")
    assert all(v.isfinite().all() for v in found)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(found, expected, strict=True) if b.norm() > 0)
    assert (sink < 0) == bool(found[0].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels(backend):
    """-100 is no label, as torch has it; another one outside is an error where it can be seen."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, IGNORE_INDEX, 39, IGNORE_INDEX, 0, 7])
    want = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(want, labels, reduction="none")
    gradient = torch.autograd.grad(expected.sum(), want)[0]
    for dtype in (torch.int64, torch.int32):
        have = logits.clone()
        losses = cross_entropy_(logits=have, labels=labels.to(dtype), weight=torch.ones(6), backend=backend)
        assert relative_error(losses, expected) < 1e-6 and relative_error(have, gradient) < 1e-5
        assert not losses[labels < 0].any() and not have[labels < 0].any()
    for wrong in (40, -1, 2**32 + 3, -99):
        spoiled = labels.clone()
        spoiled[2] = wrong
        with pytest.raises(KernelError, match=rf"labels\[2\] = {wrong} must be in \[0, V = 40\), or -100"):
            cross_entropy_(logits=logits.clone(), labels=spoiled, weight=None, backend=backend)
        weight = torch.ones(6)
        weight[2] = 0.0
        have = logits.clone()
        cross_entropy_(logits=have, labels=spoiled, weight=weight, backend=backend)  # a row that does not count
        assert have.isfinite().all() and not have[2].any()
        *_, picked = softmax_statistics(logits=logits, labels=spoiled, first=0, backend=backend)
        assert picked[2] == 0 and picked[4] == logits[4, 0]
    with pytest.raises(KernelError, match="labels of torch.float32 must be int64 or int32"):
        cross_entropy_gradient_(logits=logits, labels=labels.float(), log_sum=torch.zeros(6), weight=torch.ones(6))


def test_wrong_memories_are_named():
    x = tensors()
    memory = HolaState.empty(B, H, K, K, **SIZES)
    tokens = {n: x[n] for n in ("q", "k", "v", "gamma_q", "gamma_k", "sink")} | {"score": x["beta"]}
    for name, held in memory.tensors().items():
        for spoiled in (held[..., :-1], held.to(torch.float64 if held.dtype == torch.int64 else torch.int64)):
            with pytest.raises(KernelError, match="state"):
                wrong = HolaState(**{**vars(memory), name: spoiled})
                exact_read(**tokens, **SIZES, memory=wrong, backend=BACKENDS[-1])
    one = {n: v[:, 0] if v.ndim > 2 else v for n, v in x.items()}
    for argument in ("gate", "gamma_q", "sink"):
        with pytest.raises(KernelError, match=argument):
            hola_attention_step(**{**one, argument: one[argument][:1]}, state=memory, backend=BACKENDS[-1])
    state = torch.zeros(1, H, K, K).expand(B, -1, -1, -1)
    five = {n: one[n] for n in ("q", "k", "v", "log_decay", "beta")}
    with pytest.raises(KernelError, match="updated in place and is an expanded view"):
        gated_delta_step(**five, state=state, backend=BACKENDS[-1])
    with pytest.raises(KernelError, match="x .* must be"):
        short_conv_step(x=torch.zeros(2, 4), weight=torch.zeros(4), tail=torch.zeros(2, 3, 4))
    for block, slots in ((0, 4), (16, -1), (16.0, 4), (True, 4)):
        with pytest.raises(KernelError, match="must be a whole number of at least"):
            hola_attention(**x, block=block, slots=slots, backend=BACKENDS[-1])
    for call in (lambda: select_cache(score=x["q"]), lambda: cache_ages(score=x["beta"].long()),
                 lambda: read_mass(**{**tokens, "sink": x["sink"][:1]})):
        with pytest.raises(KernelError):
            call()


if not INTERPRETED:
    COMPILED = """
        import torch
        from hola_kernels import gated_rms_norm, hola_attention, short_conv
        from hola_kernels.verify_cases import attention_inputs

        x = {n: v.detach() for n, v in attention_inputs(1, 70, 2, 16, 16, torch.float32, 0, "cpu").items()}

        def model(q, scale, cu):
            y = short_conv(x=q.flatten(2) * scale, weight=torch.ones(32, 4), cu_seqlens=cu).view(q.shape)
            o = hola_attention(**{**x, "q": y}, block=16, slots=4, cu_seqlens=cu) * scale
            return gated_rms_norm(x=o, gate=o, weight=torch.ones(16)).sin()

        compiled = torch.compile(model, backend="eager")
        for cu_seqlens in ([0, 20, 70], [0, 50, 70]):
            grads = []
            for run in (model, compiled):
                scale = torch.tensor(1.5, requires_grad=True)
                y = run(x["q"], scale, torch.tensor(cu_seqlens))
                grads.append((y, torch.autograd.grad(y.sum(), scale)[0]))
            assert all(torch.equal(a, b) for a, b in zip(*grads))
        print("compiled and plain are the same")
    """

    def test_a_compiled_model_calls_the_operations_as_they_are():
        environment = {n: v for n, v in os.environ.items() if n not in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")}
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(COMPILED)], env=environment, capture_output=True,
                              text=True, timeout=500, check=False)
        assert "compiled and plain are the same" in done.stdout, done.stderr[-3000:]
else:
    def test_a_norm_of_heads_that_lie_two_thousand_million_numbers_apart():
        """Offsets in 64 bits; of the 4 GB only the pages that are used are ever there."""
        from hola_kernels.gated_norm.triton_rows import gated_rms_norm_triton

        stride = 2**30 + 64  # of heads: two of them are more than 32 bits can count
        whole = torch.empty(2 * stride + 4096, dtype=torch.float16)
        x = whole.as_strided((5, 3, 64), (64, stride, 1))
        x.copy_(torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0)))
        weight = torch.ones(64)
        y = gated_rms_norm_triton(x, x, weight, 1e-5)
        assert torch.equal(y, gated_rms_norm_triton(x.contiguous(), x.contiguous(), weight, 1e-5))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_tensor_is_named(name):
    function, given, options = operations()[name]
    optional = ("sink", "tail", "initial_state", "A_log", "dt_bias", "log_weight")
    for argument in given:
        for wrong in (given[argument].tolist(), "x", 1.0, *[None] * (argument not in optional)):
            with pytest.raises(KernelError, match=f"{argument} must be a tensor, not "):
                function(**{**given, argument: wrong}, **options, backend=BACKENDS[-1])


def test_lengths_and_memories_of_other_types_are_named():
    x, cu_seqlens = tensors(1), torch.tensor([0, T])
    for longest in (float(T), float("nan"), str(T), True, cu_seqlens[1]):
        with pytest.raises(KernelError, match="max_seqlen = .* must be a whole number"):
            hola_attention(**x, **SIZES, cu_seqlens=cu_seqlens, max_seqlen=longest, backend=BACKENDS[-1])
    one = {n: v[:, 0] if v.ndim > 2 else v for n, v in x.items()}
    for wrong in ("x", torch.zeros(1, H, K, K)):
        with pytest.raises(KernelError, match="state must be a HolaState"):
            hola_attention(**x, **SIZES, state=wrong, backend=BACKENDS[-1])
        with pytest.raises(KernelError, match="state must be a HolaState"):
            hola_attention_step(**one, state=wrong, backend=BACKENDS[-1])
