"""Choices made step by step, as one ONNX `Scan` node: a graph of one step, however many there are, also where K is an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

State = TypeVar("State", Tensor, tuple[Tensor, ...])


def sequential(
    step: Callable[[State, Tensor], tuple[State, Tensor]], state: State, count: int
) -> tuple[State, Tensor]:
    """Take `count` steps, at least one.

    Args:
        step: (state, number of the step) -> (state of the same shapes and types, what the step gives). It must give no view of
            what it was given.
        state: before the first step.
        count: plain or symbolic.

    Returns:
        The last state, and what the steps gave, stacked along a new first axis.
    """
    last, given = scan(step, state, torch.arange(count), dim=0)
    return last, given
