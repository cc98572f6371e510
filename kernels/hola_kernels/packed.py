"""The documents of a packed row, as the operations see them: a copy of cu_seqlens that nobody changes.

`cu_seqlens` of an operation may be a tensor or a `PackedDocuments`. Of a tensor on the CPU the last copy is stored with
it, and every call compares the numbers: tables are made again where they differ, whoever wrote them. The numbers of a
tensor on a GPU cannot be looked at without waiting for the GPU. So an operation copies them there and makes its tables
again, and one that needs them on the host (the gated delta rule without max_seqlen) waits in every call. A training
step that has cu_seqlens on the GPU makes one PackedDocuments a micro-batch and gives it to all layers: it is read once,
or with max_seqlen never.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from hola_kernels.errors import KernelError
from hola_kernels.memo import hold, is_capturing, is_constant, mark_constant, memoise
from hola_kernels.transfer import sent

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class PackedDocuments:
    """N documents, one after the other: document n has the tokens cu_seqlens[n]:cu_seqlens[n + 1] of the row.

    cu_seqlens [N + 1] integers, rising from 0 to `tokens` where given, at least two; copied.
    max_seqlen: no document is longer; with it, numbers on a GPU are not read on the host (and not checked).
    Raises KernelError.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int | None = None, tokens: int | None = None):
        _check_kind(cu_seqlens, tokens)
        check_max_seqlen(max_seqlen, cu_seqlens)
        self.count, self.max_seqlen = cu_seqlens.numel() - 1, max_seqlen
        with torch.inference_mode(False), torch.no_grad():
            on_device = cu_seqlens.is_cuda
            self._given = None if on_device else cu_seqlens.detach().clone()
            self._device = mark_constant(cu_seqlens.detach().to(torch.int64, copy=True)) if on_device else None
            self._host = None if on_device else mark_constant(self._given.to(torch.int64, copy=True))
        self._sent: dict[torch.device, Tensor] = {}
        self._tokens: int | None = None
        if not on_device or (max_seqlen is None and not is_capturing()):
            self.check(tokens)

    def host(self) -> Tensor:
        """cu_seqlens [N + 1] int64 on the CPU; from a GPU it is read once, and waited for."""
        if self._host is None:
            if is_capturing():
                raise KernelError("cu_seqlens on the GPU would be read while a CUDA graph is recorded; give max_seqlen")
            self._host = mark_constant(self._device.cpu())
        return self._host

    def on(self, device: torch.device) -> Tensor:
        """cu_seqlens [N + 1] int64 on this device."""
        if device.type == "cpu":
            return self.host()
        if self._device is not None and (device.index is None or device == self._device.device):
            return hold(self._device)
        if device not in self._sent:
            with torch.inference_mode(False):
                self._sent[device] = mark_constant(sent(self.host(), device))
        return hold(self._sent[device])

    @property
    def longest(self) -> int:
        """Tokens of the longest document, or where they are not known on the host a bound of them: max_seqlen."""
        if self._host is None and self.max_seqlen is not None:
            return self.max_seqlen
        host = self.host()
        return max(memoise(host, "longest", lambda: int(host.diff().max())), self.max_seqlen or 0)

    def check(self, tokens: int | None) -> None:
        """KernelError unless cu_seqlens rises from 0 to `tokens` (None: to anywhere)."""
        if self._tokens is None:
            cu_seqlens = self.host()
            rising = int(cu_seqlens[0]) == 0 and not bool((cu_seqlens.diff() < 0).any())
            self._tokens = int(cu_seqlens[-1]) if rising else -1
        if self._tokens < 0 or tokens not in (None, self._tokens):
            raise KernelError(f"{_wanted(tokens)}; these are {_shown(self.host())}")

    def holds(self, cu_seqlens: Tensor) -> bool:
        """Whether a tensor on the CPU still has the numbers that were copied."""
        return (self._given is not None and self._given.dtype == cu_seqlens.dtype
                and torch.equal(self._given, cu_seqlens))


_kept: dict[int, tuple[weakref.ref, PackedDocuments]] = {}
_checked: dict[int, tuple[weakref.ref, int, int]] = {}  # on a GPU: version and tokens when last read


def documents_of(x: Tensor, cu_seqlens: Tensor | PackedDocuments | None, *, max_seqlen: int | None = None,
                 read: bool = True) -> PackedDocuments | None:
    """The documents that cut the T tokens of x [1, T, ...], None without cu_seqlens.

    read: the operation needs the numbers on the host; without it (or with max_seqlen) those on a GPU are looked at once
    a version, for the check alone. Raises KernelError.
    """
    if cu_seqlens is None:
        return None
    if x.shape[0] != 1:
        raise KernelError(f"cu_seqlens needs B = 1 (documents packed in one row), got B = {x.shape[0]}")
    if isinstance(cu_seqlens, PackedDocuments):
        if cu_seqlens.max_seqlen is None or cu_seqlens._tokens is not None:
            cu_seqlens.check(x.shape[1])
        return cu_seqlens
    _check_kind(cu_seqlens, x.shape[1])
    check_max_seqlen(max_seqlen, cu_seqlens)
    if not cu_seqlens.is_cuda:
        documents = _of_host(cu_seqlens, x.shape[1])
        documents.check(x.shape[1])
        return documents
    if is_capturing():
        return PackedDocuments(cu_seqlens, max_seqlen or x.shape[1])
    if read and max_seqlen is None:
        documents = PackedDocuments(cu_seqlens, tokens=x.shape[1])
        known = _kept.get(id(cu_seqlens))
        if known is not None and known[0]() is cu_seqlens and known[1].holds(documents.host()):
            documents = known[1]  # its tables as well
        else:
            documents._given = documents.host()
            _keep(cu_seqlens, documents)
        documents.check(x.shape[1])
        return documents
    documents = PackedDocuments(cu_seqlens, max_seqlen or x.shape[1])
    if not _was_checked(cu_seqlens, x.shape[1]):
        documents.check(x.shape[1])
    return documents


def _of_host(cu_seqlens: Tensor, tokens: int) -> PackedDocuments:
    known = _kept.get(id(cu_seqlens))
    if known is not None and known[0]() is cu_seqlens and (is_constant(cu_seqlens) or known[1].holds(cu_seqlens)):
        return known[1]
    return _keep(cu_seqlens, PackedDocuments(cu_seqlens, tokens=tokens))


def _keep(cu_seqlens: Tensor, documents: PackedDocuments) -> PackedDocuments:
    number = id(cu_seqlens)
    _kept[number] = (weakref.ref(cu_seqlens, lambda _: _kept.pop(number, None)), documents)
    return documents


def _was_checked(cu_seqlens: Tensor, tokens: int) -> bool:
    """Whether this tensor on a GPU was read in this version; from now on it counts as read."""
    if cu_seqlens.is_inference():
        return False
    number, seen = id(cu_seqlens), _checked.get(id(cu_seqlens))
    if seen is not None and seen[0]() is cu_seqlens and seen[1:] == (cu_seqlens._version, tokens):
        return True
    _checked[number] = (weakref.ref(cu_seqlens, lambda _: _checked.pop(number, None)), cu_seqlens._version, tokens)
    return False


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor | PackedDocuments | None) -> None:
    if max_seqlen is None:
        return
    whole = isinstance(max_seqlen, int) and not isinstance(max_seqlen, bool)
    if not whole or cu_seqlens is None or max_seqlen < 1:
        raise KernelError(f"max_seqlen = {max_seqlen!r} must be a whole number of at least 1 and comes with "
                          "cu_seqlens; leave it out")


def _check_kind(cu_seqlens: Tensor, tokens: int | None = None) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise KernelError(f"cu_seqlens must be a tensor or PackedDocuments, not {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in INTEGERS or cu_seqlens.numel() < 2:
        raise KernelError(f"{_wanted(tokens)}; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")


def _wanted(tokens: int | None) -> str:
    return f"cu_seqlens must be integers rising from 0 to T{'' if tokens is None else f' = {tokens}'}, at least two"


def _shown(cu_seqlens: Tensor) -> str:
    numbers = cu_seqlens.tolist()
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:6]))}, ..., {numbers[-1]}]"


__all__ = ["PackedDocuments", "check_max_seqlen", "documents_of"]
