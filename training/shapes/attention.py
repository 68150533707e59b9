"""Attention and the element-wise parts of a transformer layer as single autograd steps.

On a CPU these small layers are bound by memory traffic, so each function saves only what its own backward needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGIT = 60.0  # exp() stays far inside bfloat16's range


class ExpAttend(torch.autograd.Function):
    """(exp(q k^T) * mask) v, where v carries a column of ones: a softmax whose division is left to the caller.

    q [..., M, D], k [..., N, D], v [..., N, E], mask broadcastable to [..., M, N] or None; q is already scaled.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = torch.matmul(q, k.transpose(-1, -2)).clamp_(max=MAX_LOGIT).exp_()
        if mask is not None:
            weights.mul_(mask)
        ctx.save_for_backward(q, k, v, weights)
        return torch.matmul(weights, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_v = torch.matmul(weights.transpose(-1, -2), grad)
        grad_logits = torch.matmul(grad, v.transpose(-1, -2)).mul_(weights)
        grad_q = torch.matmul(grad_logits, k)
        grad_k = torch.matmul(grad_logits.transpose(-1, -2), q)
        return grad_q, grad_k, grad_v, None


class Rotate(torch.autograd.Function):
    """Rotary embedding x * cos + rotate_half(x) * sin. The caller gets rotate_half(x) from a linear layer with
    rotated rows, which is cheaper here than shuffling halves. All arguments share one layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half_turned: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.mul(x, cos).addcmul_(half_turned, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return grads[0] * cos, grads[0] * sin, None, None


def half_turn(weight: Tensor, heads: int) -> Tensor:
    """The weight [heads * dim, in] of a layer whose output is rotate_half of the original layer's output."""
    first, second = weight.view(heads, 2, -1, weight.shape[-1]).unbind(1)
    return torch.stack([-second, first], dim=1).view_as(weight)


class UnitRms(torch.autograd.Function):
    """x / rms(x) in bfloat16 from a float32 x [tokens, dim]; the norm's weight belongs to the next linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        )
        unit = (x * inverse).bfloat16()
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse = ctx.saved_tensors
        grad = grads[0]
        along = (grad * unit).sum(-1, keepdim=True, dtype=torch.float32).div_(unit.shape[-1])
        out = torch.addcmul(grad.float(), unit, along, value=-1).mul_(inverse)
        return out, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up, elementwise, bfloat16."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad = grads[0]
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
