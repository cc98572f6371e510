"""Host memory to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.errors import KernelError


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A copy from pageable memory waits until the device has done all before it; from pinned, not."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise KernelError("a table would be sent to the GPU while a CUDA graph is recorded, which would send it again "
                          "from memory that is gone; run the call once before, or give cu_seqlens on the GPU with "
                          "max_seqlen")
    return x.pin_memory().to(device, non_blocking=True)
