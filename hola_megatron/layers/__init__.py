"""Layer kinds: one folder a kind, one line each in registry.py.

A kind is described once, by a `LayerKind` (spec.py): its table of parameters, its Megatron mixer, its costs and its
requirements. Initialisation, public names, parameter counts, checkpoints, Muon, the plan, the profiler and the recipe
checks read that description; none of them names a kind. This package imports without torch: mixers are imported when
a model is built.
"""
