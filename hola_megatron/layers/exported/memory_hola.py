"""Base class of a layer's decoding state. Copied into every export."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class LayerMemory:
    """Attributes named in `fields`: tensors with sequences on axis 0, or None before the first token.

    All tensors are detached: no gradient flows from one call to an earlier one.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    fields: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set every field to None."""
        for name in self.fields:
            setattr(self, name, None)

    @property
    def is_initialized(self) -> bool:
        return getattr(self, self.fields[0]) is not None

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by change(tensor)."""
        for name in self.fields:
            state = getattr(self, name)
            if state is not None:
                state = change(state) if isinstance(state, Tensor) else state.map(change)
            setattr(self, name, state)

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        found: list[Tensor] = []
        for value in (getattr(self, name) for name in self.fields):
            if value is not None:
                found += [value] if isinstance(value, Tensor) else value.tensors().values()
        return found

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences `beam_idx` [N], in that order."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, _: int) -> None:
        raise NotImplementedError("the state of a HOLA model cannot be rolled back to an earlier token")

    def get_max_cache_shape(self) -> int:
        return -1

    get_max_length = get_max_cache_shape

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors())
