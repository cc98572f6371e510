"""Softmax attention in a sliding window, or in a chunk, of any documents in a row; linear in the row's length.

The row is cut into bands of W tokens wherever documents begin. A token of a band sees tokens of its own band and of the
one before it at most, so each band is one small attention under a mask, and nothing is read on the host.

Shapes: M tokens, flat; J bands; H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.norms import compute_dtype
from hola_kernels.positions import angles, rotated

PADDING, BEFORE = -2, -3  # documents of indices that hold no token, at the row's end and before its start


@dataclass(frozen=True)
class Bands:
    """Who sees whom: mask [J, 1, W, 2 W] bool, of a band's queries over the band before it and itself; and the
    rotation of every token, cos and sin [M, 1, K / 2]."""

    mask: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, document_M: Tensor, position_M: Tensor, *, window: int, chunked: bool, key_dim: int, rope_theta: float,
           dtype: torch.dtype) -> Bands:
        """document, position [M] int64: each token's document and its position there; documents follow one another.

        A token sees those of its document at most window - 1 positions back; chunked: and in its chunk of `window`
        tokens.
        """
        mask = band_mask(document_M, position_M, window, chunked)
        return cls(mask, *angles(position_M, key_dim, rope_theta, dtype))

    def attend(self, q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor) -> Tensor:
        """o [M, H, V]: softmax of q . k / sqrt(K) with both rotated."""
        count, _, window, _ = self.mask.shape
        q, k = (rotated(x, self.cos, self.sin) for x in (q_MHK, k_MHK))
        q, k, v = (_in_bands(x, count, window) for x in (q, k, v_MHV))
        o = F.scaled_dot_product_attention(q, _with_before(k), _with_before(v), attn_mask=self.mask)
        return o.transpose(1, 2).flatten(0, 1)[: v_MHV.shape[0]]


def band_mask(document_M: Tensor, position_M: Tensor, window: int, chunked: bool) -> Tensor:
    """[J, 1, W, 2 W] bool."""
    count = -(-document_M.numel() // window)
    missing = count * window - document_M.numel()
    document = F.pad(document_M, (0, missing), value=PADDING).view(count, window)
    position = F.pad(position_M, (0, missing)).view(count, window)  # padding sees padding: no row is empty
    of_key = torch.cat([torch.cat([torch.full_like(document[:1], BEFORE), document[:-1]]), document], 1)
    at_key = torch.cat([torch.cat([torch.zeros_like(position[:1]), position[:-1]]), position], 1)
    back = position[:, :, None] - at_key[:, None]
    seen = (document[:, :, None] == of_key[:, None]) & (back >= 0) & (back < window)
    if chunked:
        seen &= position[:, :, None] // window == at_key[:, None] // window
    return seen[:, None]


def rope_dtype(x: Tensor) -> torch.dtype:
    """Of cos and sin for x."""
    return compute_dtype(x)


def _in_bands(x_MHD: Tensor, count: int, window: int) -> Tensor:
    """[M, H, D] -> [J, H, W, D], zeros at the end."""
    padded = F.pad(x_MHD, (0, 0, 0, 0, 0, count * window - x_MHD.shape[0]))
    return padded.unflatten(0, (count, window)).transpose(1, 2)


def _with_before(x_JHWD: Tensor) -> Tensor:
    """[J, H, 2 W, D]: the band before, and the band."""
    return torch.cat([torch.cat([torch.zeros_like(x_JHWD[:1]), x_JHWD[:-1]]), x_JHWD], 2)
