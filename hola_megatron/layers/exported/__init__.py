"""Code shared by the exported modules of all layer kinds.

These files are copied into every export (hola_megatron/hf/code.py) and import torch and transformers only.
"""
