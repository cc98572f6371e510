"""The Triton gated delta rule under Triton's interpreter, on the CPU, tiny shapes.

It shows errors of indexing, masks and formulas; miscompiles, rounding of 16-bit products and races are for
`python -m hola_kernels.verify` on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import INTERPRETED

from hola_kernels import KernelError, gated_delta_rule

if not INTERPRETED:
    def test_without_the_interpreter_the_cpu_is_refused_by_name():
        x = torch.randn(1, 4, 1, 64)
        with pytest.raises(KernelError, match="TRITON_INTERPRET"):
            gated_delta_rule(q=x, k=x, v=x, log_decay=-x[..., 0] ** 2, beta=x[..., 0].sigmoid(), backend="triton")
else:
    from hola_kernels import triton_config
    from hola_kernels.gated_delta import triton_layout
    from hola_kernels.gated_delta.verify_cases import KINDS, limit, measure

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_outputs_and_gradients_match_the_definition(kind):
        check(KINDS[kind] | {"cu_seqlens": tuple(min(cut, 130) for cut in KINDS[kind]["cu_seqlens"]), "heads": 2})

    @pytest.mark.parametrize("length", [1, 63, 64, 65])
    def test_lengths_around_a_chunk(length):
        check({"cu_seqlens": (0, length), "decay": 0.01}, heads=1)

    @pytest.mark.parametrize(("key", "value"), [(64, 128), (128, 64), (256, 64)])
    def test_unequal_dimensions(key, value):
        check({"cu_seqlens": (0, 70), "decay": 0.01}, heads=1, key=key, value=value)

    @pytest.mark.parametrize("kind", ["packed", "split"])
    def test_the_tiles_of_gpus_with_little_shared_memory(kind, monkeypatch):
        monkeypatch.setattr(triton_config, "has_small_blocks", lambda: True)
        assert triton_config.launch_of("gated_delta_forward", 128, 128, 2).tile == 64
        cu_seqlens = tuple(min(bound, 130) for bound in KINDS[kind]["cu_seqlens"])
        check(KINDS[kind] | {"cu_seqlens": cu_seqlens}, heads=1, key=128, value=128, dtype=torch.float16)

    def test_half_precision():
        check({"cu_seqlens": (0, 100), "decay": 0.01}, dtype=torch.float16)

    def test_half_precision_in_spans():
        check(KINDS["split"] | {"cu_seqlens": (0, 0, 20, 300), "chunks_a_span": 1, "heads": 1}, dtype=torch.float16)

    def test_what_is_remembered_over_many_spans_is_not_worn_down():
        check(KINDS["split, early writes"], dtype=torch.float16)

    def test_only_empty_documents_hand_the_state_on():
        x = torch.randn(1, 0, 2, 64)
        state = torch.randn(2, 2, 64, 64)
        o, score, last = gated_delta_rule(q=x, k=x, v=x, log_decay=x[..., 0], beta=x[..., 0], backend="triton",
                                          cu_seqlens=torch.tensor([0, 0, 0]), initial_state=state)
        assert o.shape == x.shape and score.shape == x.shape[:3] and torch.equal(last, state)

    def test_batches_without_a_state_and_inputs_that_are_views():
        both = torch.randn(2, 40, 1, 128)
        q, k = both[..., :64], both[..., 64:]
        rest = {"v": torch.randn(2, 40, 1, 64), "log_decay": -0.1 * torch.rand(2, 40, 1), "beta": torch.rand(2, 40, 1)}
        found = gated_delta_rule(q=q, k=k, **rest, backend="triton")
        expected = gated_delta_rule(q=q, k=k, **rest, backend="torch")
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))

    def test_dimensions_without_kernels_are_named():
        x = torch.randn(1, 4, 1, 48)
        with pytest.raises(KernelError, match="K = 48, the gated delta kernels take 64, 128, 256"):
            gated_delta_rule(q=x, k=x, v=x, log_decay=-x[..., 0] ** 2, beta=x[..., 0].sigmoid(), backend="triton")

    def test_a_layout():
        cu_seqlens = torch.tensor([0, 0, 100, 101])
        layout = triton_layout.layout_of(cu_seqlens, cu_seqlens.device, 1)
        assert layout.chunks.tolist() == [[0, 64], [64, 36], [100, 1]]
        assert layout.spans.tolist() == [[0, 0, 0], [0, 64, 0], [64, 100, 1], [100, 101, 2]]
        assert layout.segment_spans.tolist() == [[0, 1], [1, 2], [3, 1]] and layout.most_spans == 2

    @pytest.mark.parametrize("cu_seqlens", [[0, 0, 100, 101], [0, 64, 128, 128, 128], [0, 300], [0, 0, 0]])
    @pytest.mark.parametrize("span_chunks", [1, 2])
    def test_a_bounded_layout_is_the_exact_one_and_nothing_after_it(cu_seqlens, span_chunks):
        """Chunks and spans in the same order; segments of several spans, of one, of none."""
        tokens, cu_seqlens = cu_seqlens[-1], torch.tensor(cu_seqlens)
        exact = triton_layout.layout_of(cu_seqlens, cu_seqlens.device, span_chunks)
        bounded = triton_layout.bounded_layout(cu_seqlens, tokens, span_chunks, split=True)
        for name in ("chunks", "spans"):
            want, found = getattr(exact, name), getattr(bounded, name)
            assert torch.equal(found[:len(want)], want) and found.dtype == want.dtype and not found[len(want):].any()
        assert torch.equal(bounded.segment_spans, exact.segment_spans)
        whole = triton_layout.bounded_layout(cu_seqlens, tokens, 99, split=False)
        assert torch.equal(whole.spans, triton_layout.layout_of(cu_seqlens, cu_seqlens.device, 99).spans)
        assert whole.most_spans == 1

    def check(kind, *, dtype=torch.float32, key=64, value=64, heads=2):
        errors = measure(**{"dtype": dtype, "key": key, "value": value, "heads": heads, "device": "cpu", **kind})
        name = f"gated_delta {str(dtype).removeprefix('torch.')}"
        wrong = {output: error for output, error in errors.items() if not error < limit(name, output)}
        assert len(errors) == 9 and not wrong
