"""The gated delta rule read late: every query meets a state that tokens further back have left.

    stream   o_t = K^-1/2 S_{t-W}' q_t
    chunk    o_t = K^-1/2 S_{c(t)}' q_t      c(t): the last token before t's chunk of W tokens, counted in the document

The state before a document's first token is zero. Keys, values, decays, write strengths and scores stay where they are.
Sources: delayed-stream and delayed-chunk of arXiv 2506.00744 (there for the delta rule without decay, and with the
write strength of the reading token instead of the written one's).

Neither needs a kernel of its own. Stream: queries are moved W tokens forward inside their document and outputs back.
Chunk: a row of twice the length, in which the queries of a chunk come first (tokens that write nothing and let nothing
decay) and its keys and values after them.

Shapes: M tokens of N documents, flat; H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.checks import check_tokens, segments_of
from hola_kernels.errors import KernelError
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.memo import memoise
from hola_kernels.moved_rows import moved_rows
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, check_max_seqlen, documents_of

MODES = ("stream", "chunk")


@operation
def delayed_delta_rule(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, delay: int,
                       mode: str = "stream", cu_seqlens: Tensor | PackedDocuments | None = None,
                       max_seqlen: int | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` of whole documents, read late: o [B, T, H, V] and score [B, T, H].

    delay: W, in tokens; 0 is the rule itself. mode: "stream" or "chunk". The rest as in gated_delta_rule.
    Raises KernelError.
    """
    check_tokens(q, k, v, log_decay=log_decay, beta=beta)
    check_delay(delay, mode)
    check_max_seqlen(max_seqlen, cu_seqlens)
    documents = documents_of(q, cu_seqlens, max_seqlen=max_seqlen)
    tokens = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    if not delay or not v.numel():
        return gated_delta_rule(**tokens, cu_seqlens=documents, max_seqlen=max_seqlen, backend=backend)[:2]
    bounds = segments_of(q, documents)
    if mode == "stream":
        tokens["q"] = shifted(q, bounds, -delay)
        o, score, _ = gated_delta_rule(**tokens, cu_seqlens=documents, max_seqlen=max_seqlen, backend=backend)
        return shifted(o, bounds, delay), score
    table = doubled_table(bounds, q.shape[0] * q.shape[1], delay)
    row = {name: table.spread(x) for name, x in tokens.items()}
    for name in ("log_decay", "beta"):
        row[name] = row[name].masked_fill(~table.writes.view(row[name].shape[:2])[..., None], 0.0)
    twice, longest = stretched_documents(documents, q.device, max_seqlen, 2)
    o, score, _ = gated_delta_rule(**row, cu_seqlens=twice, max_seqlen=longest, backend=backend)
    return table.reading(o), table.writing(score)


def check_delay(delay: int, mode: str) -> None:
    """KernelError for a delay or a mode that is none."""
    if not isinstance(delay, int) or isinstance(delay, bool) or delay < 0:
        raise KernelError(f"delay = {delay!r} must be a whole number of at least 0")
    if mode not in MODES:
        raise KernelError(f"mode: {mode!r} is not one of {', '.join(MODES)}")


def shifted(x: Tensor, bounds: Tensor, by: int) -> Tensor:
    """y_t = x_{t - by} of the same document, zero where there is none.

    x [B, T, ...]; bounds [N + 1] int64: cumulative lengths of the documents of its tokens.
    """
    tokens = x.shape[0] * x.shape[1]
    way, back = (memoise(bounds, ("shifted", way, tokens), lambda way=way: _shift_table(bounds, tokens, way))
                 for way in (by, -by))
    return moved_rows(x.flatten(0, 1), way, back).view(x.shape)


def _shift_table(bounds: Tensor, tokens: int, by: int) -> tuple[Tensor, Tensor]:
    """Where every token's number comes from [M] int64, and whether that is a token of its document [M] bool."""
    index = torch.arange(tokens, device=bounds.device)
    segment = torch.searchsorted(bounds, index, right=True) - 1
    source = index - by
    valid = (source >= bounds[segment]) & (source < bounds[segment + 1])
    return torch.where(valid, source, index), valid


@dataclass(frozen=True)
class Doubled:
    """A row of twice the tokens: of every chunk first its reads, then its writes.

    source [2 M] int64: the token of each index; writes [2 M] bool; read_at, write_at [M] int64: each token's indices.
    """

    source: Tensor
    writes: Tensor
    read_at: Tensor
    write_at: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, 2 T, ...]."""
        rows = moved_rows(x.flatten(0, 1), (self.source, None), (self.read_at, None), (self.write_at, None))
        return rows.view(x.shape[0], -1, *x.shape[2:])

    def reading(self, x: Tensor) -> Tensor:
        """[B, 2 T, ...] -> [B, T, ...], of the indices that read."""
        rows = moved_rows(x.flatten(0, 1), (self.read_at, None), (self.source, ~self.writes))
        return rows.view(x.shape[0], -1, *x.shape[2:])

    def writing(self, x: Tensor) -> Tensor:
        """[B, 2 T, ...] -> [B, T, ...], of the indices that write."""
        rows = moved_rows(x.flatten(0, 1), (self.write_at, None), (self.source, self.writes))
        return rows.view(x.shape[0], -1, *x.shape[2:])


def doubled_table(bounds: Tensor, tokens: int, delay: int, seen: Tensor | None = None) -> Doubled:
    """seen [N]: tokens of every document before this call, which shift its chunks; None: none."""
    if seen is not None:
        return _doubled_table(bounds, tokens, delay, seen)
    return memoise(bounds, ("doubled", delay, tokens), lambda: _doubled_table(bounds, tokens, delay, None))


def _doubled_table(bounds: Tensor, tokens: int, delay: int, seen: Tensor | None) -> Doubled:
    index = torch.arange(tokens, device=bounds.device)
    segment = torch.searchsorted(bounds, index, right=True) - 1
    start, end = bounds[segment], bounds[segment + 1]
    carried = torch.zeros_like(index) if seen is None else (seen % delay)[segment]
    chunk = (index - start + carried) // delay
    # the chunk's first token and the one after its last, of this call
    first = torch.maximum(start, start - carried + chunk * delay)
    last = torch.minimum(end, start - carried + (chunk + 1) * delay)
    read_at = first + index
    write_at = read_at + last - first
    source = torch.empty(2 * tokens, dtype=torch.int64, device=bounds.device)
    source[read_at], source[write_at] = index, index
    writes = torch.zeros(2 * tokens, dtype=torch.bool, device=bounds.device)
    writes[write_at] = True
    return Doubled(source, writes, read_at, write_at)


def stretched_documents(documents: PackedDocuments | None, device: torch.device, max_seqlen: int | None,
                        times: int) -> tuple[PackedDocuments | None, int | None]:
    """The documents of a row that is `times` as long, and how long they are at most, if that is known."""
    if documents is None:
        return None, None
    longest = max_seqlen or documents.max_seqlen
    bounds = documents.host() if longest is None else documents.on(device)
    longest = None if longest is None else times * longest
    stretched = memoise(bounds, ("stretched documents", times, longest),
                        lambda: PackedDocuments(times * bounds, None if bounds.device.type == "cpu" else longest))
    return stretched, longest


__all__ = ["Doubled", "delayed_delta_rule", "doubled_table", "shifted", "stretched_documents"]
