"""How the output of the state and that of softmax attention become one.

    add      o_state + sigmoid(gate_h) o_exact              gate [H], a parameter
    two      sigmoid(a) o_state + sigmoid(b) o_exact        gate [..., H, 2] = (a, b) of the token
    convex   c o_state + (1 - c) o_exact, c = sigmoid(gate)        gate [..., H, V] of the token

Sources: add is HOLA's (arXiv 2607.02303), two is HAM's (arXiv 2603.22325), convex is the vector mixing of HQLT
(arXiv 2506.00744).
"""

from __future__ import annotations

from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating
from hola_kernels.errors import KernelError
from hola_kernels.norms import compute_dtype


def merge_outputs(o_state: Tensor, o_exact: Tensor, gate: Tensor, merge: str, backend: str = "auto") -> Tensor:
    """o [..., H, V] of two outputs of this shape, computed in float32 (float64) and returned in the dtype of o_exact.

    gate, merge: as above. The Triton backend reads each output once and saves nothing but its inputs.
    """
    refusal = "the merge of two outputs does not take float64" if compute_dtype(o_exact).itemsize == 8 else None
    if choose_backend(backend, o_exact.device, refusal) == "triton" and o_exact.numel():
        return _merge_triton(o_state, o_exact, gate, merge)
    compute = compute_dtype(o_exact)
    state, exact, weight = o_state.to(compute), o_exact.to(compute), gate.to(compute).sigmoid()
    if merge == "add":
        o = state + weight[:, None] * exact
    elif merge == "two":
        o = weight[..., :1] * state + weight[..., 1:] * exact
    else:
        o = weight * state + (1 - weight) * exact
    return o.to(o_exact.dtype)


def _merge_triton(o_state: Tensor, o_exact: Tensor, gate: Tensor, merge: str) -> Tensor:
    from hola_kernels.merge.triton_rows import merge_triton  # on first use: triton may be missing

    return merge_triton(o_state, o_exact, gate, merge)


def check_gate(gate: Tensor, v: Tensor, merge: str) -> None:
    """KernelError where the gate does not fit the merge; v [..., H, V]."""
    if gate is None:
        raise KernelError("gate must be a tensor, not None")
    check_floating(gate=gate)
    shape = {"add": v.shape[-2:-1], "two": (*v.shape[:-1], 2), "convex": v.shape}[merge]
    if gate.shape != tuple(shape):
        raise KernelError(f"gate {tuple(gate.shape)} must be {list(shape)} for merge {merge!r}")
