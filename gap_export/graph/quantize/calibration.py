"""What a decoder's linear layers read while it reads a text: the second moments of their activations.

The decoder has no weights (`modeling/fake.py`). It is run as transformers runs it, all of the text in one batch, and each of its layers has
weights only while it computes: a model takes no more memory than one of its layers and the moments of that.

Shape letters: B calls, S tokens of each, H decoder width, K inner extent of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.graph.weights import WeightReader
from gap_export.modeling.components import Component
from gap_export.progress import Progress

_LANGUAGE_MODEL, _LAYERS = "language_model", "layers"
_ATTENTION = "sdpa"
"""Of transformers, causal; the decoder's own makes nodes of a graph."""


@dataclass
class Moments:
    """H of linear layers that read the same activations.

    Attributes:
        keys: in the checkpoint, of their weights.
        moments_KK: X^T X in float32, X being all tokens' activations.
    """

    keys: list[str]
    moments_KK: NDArray[np.float32]


Receive = Callable[[Moments], None]
Calibrate = Callable[[Receive], None]
"""Runs a decoder, and hands over the moments of its linear layers, some at a time; they may be dropped then."""


def hand_over_moments(
    receive: Receive,
    component: Component,
    checkpoint: Checkpoint,
    ids_BS: NDArray[np.int64],
    wanted: Mapping[str, str],
    progress: Progress,
) -> None:
    """Run a decoder over a text.

    Args:
        receive: is given the moments of each layer after it has run.
        component: the decoder, or one of the two graphs of a decoder that drops tokens; here it drops none. It is left as it was.
        checkpoint: where its weights lie.
        ids_BS: ids of the text's tokens, in calls that do not see each other.
        wanted: parameter of a linear layer -> its key in the checkpoint.
        progress: told of every layer.

    Raises:
        CheckpointError: activations overflow.
    """
    decoder: Any = getattr(component.module, _LANGUAGE_MODEL)
    weights = _Weights(checkpoint, component.weight_key)
    progress.stage("calibrating the decoder's layers", total=len(decoder.layers))
    with ExitStack() as undo, torch.no_grad():
        undo.callback(setattr, decoder.config, "_attn_implementation", decoder.config._attn_implementation)
        decoder.config._attn_implementation = _ATTENTION
        for name, child in decoder.named_children():
            if name != _LAYERS:
                undo.enter_context(weights.of(child, f"{_LANGUAGE_MODEL}.{name}"))
        for number, layer in enumerate(decoder.layers):
            place = f"{_LANGUAGE_MODEL}.{_LAYERS}.{number}"
            undo.enter_context(_Layer(layer, place, weights, wanted, receive, progress).watched())
        decoder(inputs_embeds=weights.embedded(ids_BS), use_cache=False)


@dataclass(frozen=True)
class _Weights:
    """Real weights for modules that have none."""

    checkpoint: Checkpoint
    weight_key: Callable[[str], str]

    def embedded(self, ids_BS: NDArray[np.int64]) -> Tensor:
        """[B, S, H] float32; of the table no more is read than the rows of these tokens."""
        table = WeightReader(self.checkpoint, self.weight_key("embed_tokens.weight"))
        found, places = np.unique(ids_BS, return_inverse=True)
        rows = np.concatenate([table.rows(slice(index, index + 1)) for index in found])
        return torch.from_numpy(rows[places.reshape(ids_BS.shape)])

    @contextmanager
    def of(self, module: nn.Module, place: str) -> Iterator[None]:
        """While this lasts, a module's parameters are what the checkpoint says, in float32."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path, owner in module.named_modules(prefix=place):
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        before.append((owner, name, parameter))
                        owner._parameters[name] = self._read(f"{path}.{name}", parameter)
            yield
        finally:
            for owner, name, parameter in before:
                owner._parameters[name] = parameter

    def _read(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        rows = WeightReader(self.checkpoint, self.weight_key(name)).rows(slice(0, parameter.shape[0]))
        return nn.Parameter(torch.from_numpy(rows), requires_grad=False)


@dataclass
class _Layer:
    """A layer of the decoder while it is run, and what its linear layers have read so far."""

    layer: nn.Module
    place: str
    weights: _Weights
    wanted: Mapping[str, str]
    receive: Receive
    progress: Progress
    _own: ExitStack = field(default_factory=ExitStack)
    _found: list[Moments] = field(default_factory=list)
    _last: Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, the layer has weights when it computes, and its moments are handed over after it has."""
        with ExitStack() as hooks, self._own:
            hooks.callback(self.layer.register_forward_pre_hook(self._begin).remove)
            hooks.callback(self.layer.register_forward_hook(self._end).remove)
            for name, module in self.layer.named_modules(prefix=self.place):
                key = self.wanted.get(f"{name}.weight")
                if key is not None:
                    hooks.callback(module.register_forward_pre_hook(self._reader(key)).remove)
            yield

    def _begin(self, *_: Any) -> None:
        self._own.enter_context(self.weights.of(self.layer, self.place))

    def _reader(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (activations,) = inputs
            if activations is not self._last:  # layers that read the same follow each other
                rows = activations.flatten(0, -2)
                self._found.append(Moments([], (rows.T @ rows).numpy()))
                self._last = activations
            self._found[-1].keys.append(key)

        return read

    def _end(self, *_: Any) -> None:
        self._own.close()
        self._last = None
        while self._found:
            moments = self._found.pop()
            if not np.isfinite(moments.moments_KK).all():
                raise CheckpointError(
                    f"reads activations that overflow, so that {moments.keys[0]} cannot be calibrated",
                    subject=self.place,
                    hint="its weights may be damaged; without --calibration they are rounded as they are",
                )
            self.receive(moments)
        self.progress.advance()
