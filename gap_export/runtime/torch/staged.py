"""The reference of decoders that drop tokens between their layers: transformers' own layers, eager, one row at a time.

Nothing of the export path is used here. Attention maps are whole ones, caught by hooks on the attention of each layer; the choice
is that of `prune/reference_in_decoder.py`; a row has no padding, and each layer's cache is as long as what it has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from gap_export import families, prune
from gap_export.bundle.manifest import Pruning, Stage
from gap_export.families.reference import ReferenceModel, open_model
from gap_export.positions import Ids, Placement, PositionPolicy
from gap_export.prune.in_decoder.stages import load
from gap_export.runtime.session import Buffer, Prefilled
from gap_export.runtime.torch.session import TorchSession, as_loaded, shorten
from gap_export.runtime.torch.text_reference import TextReader


@dataclass
class _Row:
    """One prompt on its way through the stages.

    Attributes:
        hidden_SH: hidden states.
        ids_S: int64, what RoPE reads.
        raster_N: int64 raster indices of the visual tokens that are left.
        image_start: text tokens before the image.
        cache: of all layers.
        kept: raster indices at the beginning of every later stage.
        margin: the smallest gap that any choice was made by.
    """

    hidden_SH: Tensor
    ids_S: Tensor
    raster_N: Ids
    image_start: int
    cache: DynamicCache = field(default_factory=DynamicCache)
    kept: list[Ids] = field(default_factory=list)
    margin: float = np.inf


class StagedTorchSession(TorchSession):
    """A `TorchSession` of a model that drops tokens between decoder layers."""

    def __init__(
        self,
        model: ReferenceModel,
        pruning: Pruning,
        *,
        text_tower: TextReader | None = None,
    ) -> None:
        super().__init__(model, pruning, text_tower=text_tower)
        self._decoder: Any = model.language_model
        self._uses_next_layer_attention = load(pruning.pruner).USES_NEXT_LAYER_ATTENTION
        self._twin: Any = prune.row(pruning.pruner).load_reference()
        self._rows: list[_Row] = []
        self._maps: dict[int, Tensor] = {}
        self._hooks = [
            layer.self_attn.register_forward_hook(
                lambda module, args, out, number=number: self._maps.__setitem__(number, out[1])
            )
            for number, layer in enumerate(self._decoder.layers)
        ]

    def shifted_inside(self) -> StagedTorchSession | None:
        """This model with survivors renumbered inside the decoder; None where that is what this one does. Weights are shared."""
        if self._pruning.positions is not PositionPolicy.GAP:
            return None
        pruning = self._pruning.model_copy(update={"positions": PositionPolicy.SHIFTED})
        return StagedTorchSession(self._model, pruning, text_tower=self._text_tower)

    @torch.inference_mode()
    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on; `kept_indices` and `margins` are filled in."""
        self._check_open()
        self.caches_begun += 1
        assert placement.image_start is not None
        self._rows, logits = [], []
        for embeds_SH, ids_S, start in zip(
            embeds, placement.position_ids, placement.image_start, strict=True
        ):
            ids = torch.from_numpy(np.ascontiguousarray(ids_S[: len(embeds_SH)]))
            row = _Row(embeds_SH, ids, np.arange(self._pruning.kept), int(start))
            self._rows.append(row)
            logits.append(self._whole_prompt(row))
        return Prefilled(
            np.stack(logits),
            tuple(np.stack(stage) for stage in zip(*(row.kept for row in self._rows), strict=True)),
            np.array([row.margin for row in self._rows]),
        )

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies."""
        self._check_open()
        self.caches_begun += 1
        self._rows = [_Row(torch.empty(0), torch.empty(0), np.empty(0, np.int64), 0)]

    @torch.inference_mode()
    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; slots are the lengths of the row's own caches, by construction."""
        embed = self._model.embedding
        logits = []
        begins = (placement.write_index, *placement.stage_write_index)
        for number, (token, row, ids_1) in enumerate(
            zip(token_ids_B, self._rows, placement.position_ids, strict=True)
        ):
            stages = zip(self._pruning.stages, begins, strict=True)
            shorten(row.cache, [int(slots[number]) for stage, slots in stages for _ in stage.run])
            hidden_1H = embed(torch.tensor([int(token)]))
            for stage in self._pruning.stages:
                ids = torch.from_numpy(np.ascontiguousarray(ids_1))
                if stage.first_layer and self._pruning.positions is not PositionPolicy.GAP:
                    ids = torch.tensor([row.cache.get_seq_length(stage.first_layer)])
                hidden_1H = self._layers(stage, hidden_1H, ids, row.cache)
            logits.append(self._logits(hidden_1H))
        return np.stack(logits)

    def _free(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._decoder, self._rows = None, []
        self._maps.clear()
        super()._free()

    def _whole_prompt(self, row: _Row) -> NDArray[np.float32]:
        visual = len(row.raster_N)
        image_NH = row.hidden_SH[row.image_start : row.image_start + visual].double().numpy()
        text_TH = row.hidden_SH[row.image_start + visual :].double().numpy()
        queries, row.margin = self._twin.scoring_queries(self._pruning.pruner, image_NH, text_TH)
        for stage in self._pruning.stages:
            if stage.first_layer:
                self._cut(row, stage, queries)
            row.hidden_SH = self._layers(stage, row.hidden_SH, row.ids_S, row.cache)
        return self._logits(row.hidden_SH)

    def _cut(self, row: _Row, stage: Stage, queries: list[int]) -> None:
        if (
            self._uses_next_layer_attention
        ):  # the attention of the next layer on all that is there, and nothing else of that layer
            layer = self._decoder.layers[stage.first_layer]
            layer.self_attn(
                layer.input_layernorm(row.hidden_SH[None]),
                position_embeddings=self._rotary(row.hidden_SH, row.ids_S),
                attention_mask=self._causal(len(row.hidden_SH)),
            )
        attention_ASS = self._maps[
            stage.first_layer if self._uses_next_layer_attention else stage.first_layer - 1
        ][0]
        start, visual = row.image_start, len(row.raster_N)
        choice = self._twin.choose(
            self._pruning.pruner,
            attention_ASS.double().numpy(),
            row.hidden_SH[start : start + visual].double().numpy(),
            image_start=start,
            rows=queries,
            kept=stage.kept,
            merged=stage.merged,
        )
        row.margin = min(row.margin, choice.margin)
        order = np.argsort(choice.indices_K) if self._pruning.positions.keeps_raster_order else slice(None)
        places = choice.indices_K[order]
        image_KH = row.hidden_SH[start + torch.from_numpy(places)]
        if choice.patches_KE is not None:
            image_KH = torch.from_numpy(choice.patches_KE[order]).to(image_KH.dtype)
        after = slice(start + visual, None)
        row.hidden_SH = torch.cat([row.hidden_SH[:start], image_KH, row.hidden_SH[after]])
        if self._pruning.positions is PositionPolicy.GAP:
            row.ids_S = torch.cat(
                [row.ids_S[:start], row.ids_S[start + torch.from_numpy(places)], row.ids_S[after]]
            )
        else:
            row.ids_S = torch.arange(len(row.hidden_SH))
        row.raster_N = row.raster_N[places]
        row.kept.append(row.raster_N)

    def _layers(self, stage: Stage, hidden_SH: Tensor, ids_S: Tensor, cache: DynamicCache) -> Tensor:
        hidden_1SH = hidden_SH[None]
        for number in stage.run:
            hidden_1SH = self._decoder.layers[number](
                hidden_1SH,
                attention_mask=self._causal(len(hidden_SH)),
                position_ids=ids_S[None],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=self._rotary(hidden_1SH, ids_S),
            )
        return hidden_1SH[0]

    def _rotary(self, hidden: Tensor, ids_S: Tensor) -> tuple[Tensor, Tensor]:
        as_loaded(self._decoder)
        cos_sin: tuple[Tensor, Tensor] = self._decoder.rotary_emb(hidden, ids_S[None])
        return cos_sin

    def _causal(self, tokens: int) -> Tensor | None:
        """[1, 1, S, S], added to the logits of attention; a single token sees everything."""
        if tokens == 1:
            return None
        least = torch.finfo(self._model.dtype).min
        return torch.full((tokens, tokens), least, dtype=self._model.dtype).triu(1)[None, None]

    def _logits(self, hidden_SH: Tensor) -> NDArray[np.float32]:
        logits_V: NDArray[np.float32] = self._model.lm_head(self._decoder.norm(hidden_SH[-1])).float().numpy()
        return logits_V


def open_reference(
    family: str,
    checkpoint: Path,
    pruning: Pruning,
    *,
    parts: Mapping[str, Path] = MappingProxyType({}),
    text_tower: TextReader | None = None,
) -> TorchSession:
    """The reference of a family for a way of pruning, in fp32.

    Args:
        family: name in the table of families.
        checkpoint: folder.
        pruning: what to prune and how to number.
        parts: folders of companion checkpoints, by name.
        text_tower: for pruners that look at the expression.

    Raises:
        CheckpointError: transformers cannot load the checkpoint.
    """
    model = open_model(family, checkpoint, parts)
    if pruning.stages:
        return StagedTorchSession(model, pruning, text_tower=text_tower)
    return TorchSession(model, pruning, text_tower=text_tower, mask=families.row(family).attention_mask)
