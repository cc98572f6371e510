"""The implementation of each accelerated component on this machine, from the code that chooses it."""

from __future__ import annotations

import importlib.util

from hola_kernels.backend import auto_backend, triton_problem
from hola_megatron.doctor.facts import Facts, problem_of

# extension modules, because a package called apex may be there without them
APEX_MODULES = (("amp_C", "gradient norm and clipping, which Transformer Engine also has"),
                ("fused_layer_norm_cuda", "layer norms, not used here"),
                ("fused_weight_gradient_mlp_cuda", "adding weight gradients up inside Megatron's own linears"))


def who_provides(facts: Facts) -> dict[str, str]:
    """{component: implementation (why)}. Adapts this process to a machine without a GPU, as training does."""
    device = "cuda" if facts.devices else "cpu"
    kernels, reason = auto_backend(device)
    triton = triton_problem(device)
    return {**_of_megatron(),
            "HOLA kernels": f"{kernels} ({reason})" + (f"; triton: {triton}" if triton and triton != reason else ""),
            "softmax attn": "torch's scaled_dot_product_attention", "apex modules": _apex(facts)}


def _of_megatron() -> dict[str, str]:
    from hola_megatron.parallel.cpu import adapt_to_cpu

    try:
        adapt_to_cpu()
        from hola_megatron.engine.adam import use_group_step_adam
        from hola_megatron.model.config import choose_spec
    except Exception as error:  # a library Megatron loads is broken; the findings name it and what to do
        return dict.fromkeys(("linears", "loss", "Adam"), f"none: megatron-core does not load ({problem_of(error)})")
    from hola_megatron.recipe.schema import ModelConfig

    shape = ModelConfig(layers=1, hidden_size=8, heads=1, key_dim=8, value_dim=8, mlp_hidden_size=8, vocab_size=8)
    spec, why = choose_spec(shape)
    names = {"te": "Transformer Engine", "local": "Megatron's own"}
    return {"linears": f"{names[spec]} ({why})", "loss": _loss(spec), "Adam": use_group_step_adam()}


def _loss(spec: str) -> str:
    return "Transformer Engine's fused cross-entropy" if spec == "te" else "Megatron's, on a float32 copy of the logits"


def _apex(facts: Facts) -> str:
    found = [name for name, _ in APEX_MODULES if importlib.util.find_spec(name)]
    if not found:
        return "none (nothing here needs them)"
    missing = [name for name, _ in APEX_MODULES if name not in found]
    return ", ".join(found) + (f"; not {', '.join(missing)}" if missing else "")
