"""Models without weights: fake parameters, which have shape and type but no storage, and real buffers.

A 7B decoder built this way takes no memory, and is traced like any other. Weights come later, as references into the
checkpoint's own files (`graph/weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from gap_export.errors import TraceError

_UNFILLED = -12345

Model = TypeVar("Model", bound=nn.Module)


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors `torch.export` accepts as example inputs and parameters."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake(build: Callable[[], Model], mode: FakeTensorMode) -> Model:
    """Build a model without storage for its parameters.

    Args:
        build: constructs the model; called with the meta device as default.
        mode: the mode that parameters, and later the example inputs, belong to.

    Returns:
        The model in evaluation mode. Its buffers (rotary frequencies, position indices) hold the values transformers
        gives them.

    Raises:
        TraceError: a buffer whose value transformers does not supply.
    """
    with torch.device("meta"):
        model = build()
    model.eval()
    _fill(model, None, mode)
    return model


def _fill(module: nn.Module, owner: PreTrainedModel | None, mode: FakeTensorMode) -> None:
    """Make parameters fake and buffers real, recursively.

    Args:
        module: the module to treat.
        owner: the innermost transformers model around it, which knows how to fill its buffers; None outside of one.
        mode: of the fake parameters.
    """
    if isinstance(module, PreTrainedModel):
        owner = module
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with mode:
                storage = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(storage, requires_grad=False)
    absent = [name for name, buffer in module._buffers.items() if buffer is not None]
    for name in absent:
        module._buffers[name] = torch.full_like(module.get_buffer(name), _UNFILLED, device="cpu")
    if absent and owner is not None:
        owner._init_weights(module)
    for name in absent:
        if (module.get_buffer(name) == _UNFILLED).all():
            raise TraceError(
                "has a buffer that transformers does not fill for models built without weights",
                subject=f"{type(module).__name__}.{name}",
                hint="the versions in constraints.txt are the tested ones; otherwise please report this",
            )
    for child in module.children():
        _fill(child, owner, mode)
