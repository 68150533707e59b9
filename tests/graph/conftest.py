"""The smallest component there is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gap_export.modeling.components import Component


@pytest.fixture
def lookup() -> Callable[..., Component]:
    """`lookup(settings, vocabulary=8)`: a table of embeddings; without settings, equal to no other."""
    from torch import nn

    from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
    from gap_export.modeling.components import Component
    from gap_export.modeling.fake import fake_mode
    from gap_export.modeling.splice import Embed

    def component(settings: Hashable = None, *, vocabulary: int = 8) -> Component:
        with fake_mode():
            module = Embed(nn.Embedding(vocabulary, 4)).eval()
        batch = Dim(name="batch", minimum=1, optimum=1, maximum=4)
        given = TensorSpec(name="input_ids", dtype="int64", shape=(batch, 3))
        made = TensorSpec(name="inputs_embeds", dtype="float32", shape=(batch, 3, 4))
        spec = GraphSpec(name="embed", inputs=(given,), outputs=(made,))
        if settings is None:
            return Component(module=module, spec=spec, weight_key=str)
        return Component(module=module, spec=spec, weight_key=str, settings=settings)

    return component
