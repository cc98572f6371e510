"""HOLA-Megatron: distributed pretraining of linear-attention language models with an exact memory."""

__version__ = "0.1.0"
