"""Choices made step by step, as one ONNX `Scan` node: a graph of one step, however many there are, also where K is an input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(state, number of the step) -> (state of the same shape and type, what the step gives). Gives no view of what it was given."""


def in_steps(step: Step, state: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Take `count` steps, at least one.

    Args:
        step: one of them.
        state: before the first.
        count: plain or symbolic.

    Returns:
        The last state, and what the steps gave, stacked along a new first axis.
    """
    last, given = scan(step, state, torch.arange(count), dim=0)
    return last, given
