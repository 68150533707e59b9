"""A small decoder to trace: a stack of layers over a cache, of which single ones can be made different."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.modeling.attention import SlotCache
from gap_export.modeling.components import Component
from gap_export.modeling.fake import fake_mode
from gap_export.modeling.layers import LayerStack

WIDTH, LAYERS = 8, 7


class Layer(nn.Module):
    """Two products, an activation, and a mean over the cache."""

    def __init__(self, number: int, *, width: int = WIDTH, bias: bool = True) -> None:
        super().__init__()
        self.layer_idx = number
        self.scale = 0.5
        self.window: int | None = None
        self.write = nn.Linear(WIDTH, width, bias=bias)
        self.act: nn.Module = nn.ReLU()
        self.read = nn.Linear(width, WIDTH)

    def forward(self, hidden_BSH: Tensor, mask: Tensor, *, past_key_values: SlotCache) -> Tensor:
        """Goes through the cache."""
        written = self.write(hidden_BSH)
        values = written[..., :WIDTH].unsqueeze(1)
        _, value = past_key_values.update(values, values * self.scale, self.layer_idx)
        changed = self.read(self.act(written)) + value.mean(dim=(1, 2))[:, None]
        return hidden_BSH + changed * mask


class Stack(nn.Module):
    """All layers, one after another."""

    def __init__(self, change: Callable[[Stack], None] = lambda stack: None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(LAYERS))
        self.after: dict[int, Callable[[Tensor], Tensor]] = {}
        self.masks: dict[int, float] = {}
        change(self)

    def forward(self, hidden: Tensor, write_index: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Hidden states and the updated caches."""
        cache = SlotCache(past, write_index)
        mask = hidden.new_ones(())
        masks = {number: mask * by for number, by in self.masks.items()}
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, masks.get(number, mask), past_key_values=cache)
            hidden = self.after.get(number, lambda hidden: hidden)(hidden)
        return (hidden, *cache.present)


def component(change: Callable[[Stack], None] = lambda stack: None, **stack: Any) -> Component:
    """A component whose layers are said to be alike."""
    with fake_mode():
        module = Stack(change).eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
    batch = Dim(name="batch", minimum=1, optimum=1, maximum=4)
    tokens = Dim(name="sequence", minimum=1, optimum=3, maximum=9)
    slots = Dim(name="capacity", minimum=2, optimum=16, maximum=64)

    def tensor(name: str, *shape: int | Dim, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    def caches(when: str) -> list[TensorSpec]:
        return [
            tensor(f"{when}.{number}.{what}", batch, 1, slots, WIDTH)
            for number in range(LAYERS)
            for what in ("key", "value")
        ]

    hidden = (batch, tokens, WIDTH)
    spec = GraphSpec(
        name="decoder",
        inputs=(tensor("hidden", *hidden), tensor("write_index", batch, dtype="int64"), *caches("past")),
        outputs=(tensor("output", *hidden), *caches("present")),
    )
    runs = stack.get("runs", (range(LAYERS),))
    return Component(module, spec, weight_key=str, settings="stack", layers=LayerStack("layers", runs))
