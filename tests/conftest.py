"""Shared by all tests: no compiling on CPU, and helpers importable from the test folders."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
