"""Silence what Megatron-core says about packages a run does not need.

Imported first by every entry point. What a user must know is in our own banner, which says
which implementation runs and why.
"""

from __future__ import annotations

import logging
import os
import warnings

warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=r".*full scope is deprecated.*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
if not os.environ.get("CUDA_VISIBLE_DEVICES") and not os.path.exists("/dev/nvidia0"):
    # jit_fuser is torch.compile: on a machine without a GPU it costs minutes and gains nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
