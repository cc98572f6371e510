"""Softmax attention within documents, with grouped heads and windows: backends against a mask written out here."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch
from inputs import relative_error
from torch import Tensor
from varlen import stand_in

from hola_kernels import KernelError, PackedDocuments
from hola_kernels.softmax_attention import flash_documents, softmax_attention

module = sys.modules["hola_kernels.softmax_attention"]

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
PACKINGS = {"rows": None, "one": (0, 300), "packed": (0, 0, 1, 64, 129, 129, 300)}
LENGTH = 300  # over two runs of a small window


def make(heads: int = 4, keys: int = 4, earlier: int = 0, rows: int = 1, dtype: torch.dtype = torch.float64,
         length: int = LENGTH, width: int = 8, value: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (rows, length, heads, width), "k": (rows, earlier + length, keys, width),
              "v": (rows, earlier + length, keys, value)}
    return {n: (1.5 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
            for n, shape in shapes.items()}


def plainly(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...] | None, earlier: int,
            window: int | None) -> Tensor:
    """Every pair tested one by one."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    bounds = bounds or (0, length)
    document = [n for n, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(b - a)]
    mask = torch.full((length, earlier + length), -torch.inf, dtype=q.dtype)
    for i in range(length):
        for j in range(-earlier, i + 1):
            near = window is None or i - j < window
            if near and document[max(j, 0)] == document[i]:
                mask[i, earlier + j] = 0
    out = [torch.einsum("bij,bjv->biv", (torch.einsum("bik,bjk->bij", q[:, :, h], k[:, :, h // group])
                                         / q.shape[3] ** 0.5 + mask).softmax(-1), v[:, :, h // group])
           for h in range(q.shape[2])]
    return torch.stack(out, 2)


def check(inputs: dict[str, Tensor], backend: str, bounds: tuple[int, ...] | None, earlier: int = 0,
          window: int | None = None) -> None:
    exact_inputs = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    expected = plainly(**exact_inputs, bounds=bounds, earlier=earlier, window=window)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = torch.autograd.grad(expected, list(exact_inputs.values()), dy)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    y = softmax_attention(**inputs, cu_seqlens=cu_seqlens, earlier=earlier, window=window, backend=backend)
    found = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    dtype = inputs["q"].dtype
    assert y.shape == expected.shape and y.dtype == dtype and relative_error(y, expected) < LIMITS[dtype]
    for name, have, exact in zip(inputs, found, want, strict=True):
        scale = exact.norm().clamp_min(1)  # in a window of one token nothing depends on q and k
        assert have.dtype == dtype and (have.double() - exact).norm() < LIMITS[dtype] * scale, name


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("window", [None, 1, 2, 63, 64, 128, 129, 299, 300, 1000])
@pytest.mark.parametrize("packing", PACKINGS)
def test_windows_within_documents(packing, window, backend):
    check(make(), backend, PACKINGS[packing], window=window)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 50])
def test_grouped_heads(window, keys, backend):
    check(make(keys=keys, value=12), backend, PACKINGS["packed"], window=window)
    check(make(keys=keys, rows=2), backend, None, window=window)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("earlier", "window"), [(1, None), (77, None), (400, None), (77, 78), (20, 64), (400, 130)])
def test_keys_before_the_first_query(earlier, window, packing, backend):
    check(make(keys=2, earlier=earlier), backend, PACKINGS[packing], earlier, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_narrower_numbers(backend, dtype):
    check(make(keys=2, dtype=dtype), backend, PACKINGS["packed"], window=40)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 257])
def test_lengths(length):
    check(make(length=length), "torch", None, window=64)


def test_later_tokens_and_other_documents_change_nothing():
    bounds = torch.tensor([0, 100, 300])
    for window in (None, 30):
        inputs = {n: x.detach() for n, x in make().items()}
        before = softmax_attention(**inputs, cu_seqlens=bounds, window=window)
        for x in inputs.values():
            x[:, 250:] = 100.0
            x[:, :100] = torch.inf
        after = softmax_attention(**inputs, cu_seqlens=bounds, window=window)
        assert torch.equal(before[:, 100:250], after[:, 100:250])


def test_a_window_of_a_long_row_takes_memory_for_its_band_alone():
    """40,000 tokens: a mask of all pairs would be 1.6 GB, of float64 scores eight times that."""
    inputs = {n: x.detach() for n, x in make(heads=1, keys=1, length=40_000).items()}
    y = softmax_attention(**inputs, window=100)
    last = softmax_attention(**{n: x[:, -200:] for n, x in inputs.items()}, window=100)
    torch.testing.assert_close(y[:, -100:], last[:, -100:])


def test_nothing_at_all():
    for rows, length in ((0, 5), (2, 0)):
        y = softmax_attention(**make(rows=rows, length=length), window=3)
        assert y.shape == (rows, length, 4, 8)


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_announce", functools.cache(module._announce.__wrapped__))
    for _ in range(2):
        softmax_attention(**make(), cu_seqlens=torch.tensor([0, 7, 300]))
    messages = [r.message for r in caplog.records if "softmax attention" in r.message]
    assert messages == ["hola_kernels: softmax attention by one call a document (device cpu)"]


def test_what_flash_attention_does_not_take_is_named_without_a_device(monkeypatch):
    capability = {"now": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability["now"])
    flash_documents._of_kind.cache_clear()
    of_kind = flash_documents._of_kind.__wrapped__
    assert of_kind(0, torch.bfloat16, 64, 64) is None and of_kind(0, torch.float16, 256, 256) is None
    assert "takes 16 bits, not float32" in of_kind(0, torch.float32, 64, 64)
    for widths in ((60, 60), (264, 264), (64, 128)):
        message = "heads of {} and {} are not equal multiples of 8 up to 256".format(*widths)
        assert message in of_kind(0, torch.bfloat16, *widths)
    capability["now"] = (8, 9)
    assert "up to 192" in of_kind(0, torch.bfloat16, 256, 256) and of_kind(0, torch.bfloat16, 192, 192) is None
    capability["now"] = (7, 5)
    assert "8.0 is needed" in of_kind(0, torch.bfloat16, 64, 64)


def test_the_cuts_that_flash_attention_gets():
    """int32, the first document's keys longer by those that come before; a bound of lengths without reading them."""
    documents = PackedDocuments(torch.tensor([0, 10, 10, 30]))
    bounds, key_bounds, longest = flash_documents._bounds(documents, 1, 30, 5, torch.device("cpu"))
    assert bounds.tolist() == [0, 10, 10, 30] and key_bounds.tolist() == [0, 15, 15, 35] and longest == 20
    assert bounds.dtype == key_bounds.dtype == torch.int32
    assert documents.host().tolist() == [0, 10, 10, 30]  # tables of others are made from it
    again = flash_documents._bounds(documents, 1, 30, 5, torch.device("cpu"))
    assert again[0] is bounds and again[1] is key_bounds
    bounds, key_bounds, longest = flash_documents._bounds(None, 3, 7, 2, torch.device("cpu"))
    assert bounds.tolist() == [0, 7, 14, 21] and key_bounds.tolist() == [0, 9, 18, 27] and longest == 7
    assert PackedDocuments(torch.tensor([0, 4, 30]), 512).longest == 512
    # a bound that is too low would leave out tokens: known lengths count
    assert PackedDocuments(torch.tensor([0, 4, 30]), 5).longest == 26


@pytest.mark.parametrize("bounds", [[0, 100, 300], [0, 0, 100, 300], [0, 0, 0, 1, 100, 100, 300, 300]], ids=str)
def test_the_call_that_flash_attention_gets(bounds, monkeypatch):
    """torch's function has no CPU form: its arguments are looked at, and the definition is called instead."""
    import torch.nn.attention.varlen as varlen

    seen = {}
    monkeypatch.setattr(varlen, "varlen_attn", stand_in(seen))
    flash_documents._parameters.cache_clear()
    inputs = make(keys=2, earlier=9)
    documents = PackedDocuments(torch.tensor(bounds))
    y = flash_documents.attend_flash(*inputs.values(), documents, 9, 64)
    want = softmax_attention(**inputs, cu_seqlens=documents, earlier=9, window=64, backend="torch")
    torch.testing.assert_close(y, want)
    assert seen == {"window": (63, 0), "gqa": True, "longest": (200, 209), "shapes": ((300, 4, 8), (309, 2, 8))}
    flash_documents._parameters.cache_clear()


@pytest.mark.parametrize(("changes", "message"), [
    ({"q": torch.ones(1, 3, 4)}, r"q \(1, 3, 4\) must be \[B, S, H, K\]"),
    ({"k": torch.ones(1, 4, 2, 8)}, r"k \(1, 4, 2, 8\) must be \[B, T, G, K\] .* T = 3"),
    ({"k": torch.ones(1, 3, 3, 8)}, "k .* has 3 heads, which must divide the 4 of q"),
    ({"v": torch.ones(1, 3, 4, 8)}, r"v .* must be \[B, T, G, V\]"),
    ({"window": 0}, "window = 0 must be a whole number"), ({"window": 2.0}, "window = 2.0 must be"),
    ({"earlier": -1}, "earlier = -1 must be"), ({"backend": "fast"}, "backend: 'fast' is not one of"),
    ({"cu_seqlens": torch.tensor([0, 4])}, "must be integers rising from 0 to T = 3"),
    ({"v": torch.ones(1, 3, 2, 8, dtype=torch.int64)}, "must be floating-point")])
def test_wrong_arguments_are_named(changes, message):
    given = {"q": torch.ones(1, 3, 4, 8), "k": torch.ones(1, 3, 2, 8), "v": torch.ones(1, 3, 2, 8)}
    with pytest.raises(KernelError, match=message):
        softmax_attention(**{**given, **changes})
