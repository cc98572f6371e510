"""The cut projection: the gradients are those of a plain split, and what was written in its room is not copied."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_megatron.layers.sections import split_sections

WIDTHS = [3, 2, 4]


class Doubled(torch.autograd.Function):
    """2 x, whose gradient is left in the room it is given."""

    @staticmethod
    def forward(ctx, x, room):
        ctx.room = room
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return torch.mul(dy, 2, out=ctx.room()), None


def projected() -> Tensor:
    """[B, S, F] as a mixer gets it: a transposed [S, B, F]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 2, sum(WIDTHS), generator=generator).transpose(0, 1).requires_grad_()


def test_gradients_are_those_of_a_plain_split():
    found, expected = projected(), projected()
    (a, b, _), rooms = split_sections(found, WIDTHS)  # the last section is not used
    (Doubled.apply(a, rooms[0]).square().sum() + (b + b * b).sum()).backward()
    a, b, _ = expected.split(WIDTHS, -1)
    ((2 * a).square().sum() + (b + b * b).sum()).backward()
    assert torch.equal(found.grad, expected.grad)
    assert not found.grad[..., 5:].any()


def test_two_backward_passes_do_not_share_memory():
    x = projected()
    (a, b, c), rooms = split_sections(x, WIDTHS)
    y = Doubled.apply(a, rooms[0]).sum() + b.sum() + c.sum()
    first, = torch.autograd.grad(y, x, retain_graph=True)
    kept = first.clone()
    second, = torch.autograd.grad(3 * y, x)
    assert torch.equal(first, kept)
    assert torch.equal(second, 3 * kept)


def test_what_lies_in_its_room_is_not_copied(monkeypatch):
    copies = []
    copy = Tensor.copy_
    monkeypatch.setattr(
        Tensor, "copy_", lambda self, other, *rest: copies.append(self.shape) or copy(self, other, *rest))
    x = projected()
    (a, b, c), rooms = split_sections(x, WIDTHS)
    outputs = [Doubled.apply(part, room) for part, room in zip((a, b, c), rooms, strict=True)]
    torch.autograd.grad(sum(y.sum() for y in outputs), x)
    assert not copies
