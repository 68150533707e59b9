"""The reference of decoders that drop tokens between their layers: transformers' own layers, eager, one row at a time.

Nothing of the export path is used here. Attention maps are whole ones, caught by hooks on the attention of each layer; the choice
is that of `prune/in_decoder/reference.py`; a row has no padding, and each layer's cache is as long as what it has seen.
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
from gap_export.families.reference.qwen_vl import Stacked
from gap_export.positions import Ids, Placement, PositionPolicy
from gap_export.prune.in_decoder.stages import load
from gap_export.runtime.session import Buffer, Prefilled, rows_of_ids
from gap_export.runtime.torch.session import TorchSession, as_loaded, shorten
from gap_export.runtime.torch.text_reference import TextReader


@dataclass
class _Row:
    """One prompt on its way through the stages.

    Attributes:
        hidden_SX: hidden states, and behind them what DeepStack adds after each of the first layers.
        ids_RS: int64, what RoPE reads: one row, or the three of M-RoPE.
        raster_N: int64 raster indices of the visual tokens that are left, for every image.
        texts: how many tokens stand before, between and after the images.
        cache: of all layers.
        kept: raster indices at the beginning of every later stage, one image's behind the other's.
        margin: the smallest gap that any choice was made by.
    """

    hidden_SX: Tensor
    ids_RS: Tensor
    raster_N: list[Ids]
    texts: list[int]
    cache: DynamicCache = field(default_factory=DynamicCache)
    kept: list[Ids] = field(default_factory=list)
    margin: float = np.inf

    @property
    def images(self) -> list[slice]:
        """Where the tokens of every image stand."""
        found, start = list[slice](), 0
        for text, raster_N in zip(self.texts, self.raster_N, strict=False):
            found.append(slice(start + text, start + text + len(raster_N)))
            start = found[-1].stop
        return found


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
        decoder, self._levels = model.language_model, 0
        if isinstance(decoder, Stacked):
            decoder, self._levels = decoder.language_model, decoder.deepstack_levels
        self._decoder: Any = decoder
        self._uses_next_layer_attention = load(pruning.pruner).USES_NEXT_LAYER_ATTENTION
        self._schedule = prune.row(pruning.pruner).load_schedule()
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
        assert placement.image_slots is not None
        assert placement.stage_counts is not None
        self._rows, logits = [], []
        for number, embeds_SX in enumerate(embeds):
            ids = placement.position_ids[..., number, : len(embeds_SX)]
            slots_I2 = placement.image_slots[number]
            behind = [0, *map(int, slots_I2[:, 1])]
            row = _Row(
                embeds_SX,
                torch.from_numpy(np.atleast_2d(ids).copy()),
                [np.arange(end - first) for first, end in slots_I2],
                [int(first) - end for first, end in zip(slots_I2[:, 0], behind, strict=False)],
            )
            row.texts.append(len(embeds_SX) - behind[-1])
            self._rows.append(row)
            logits.append(self._whole_prompt(row, placement.stage_counts[number]))
        return Prefilled(
            np.stack(logits),
            tuple(rows_of_ids(stage) for stage in zip(*(row.kept for row in self._rows), strict=True)),
            np.array([row.margin for row in self._rows]),
        )

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies."""
        self._check_open()
        self.caches_begun += 1
        self._rows = [_Row(torch.empty(0), torch.empty(0), [], [])]

    @torch.inference_mode()
    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; slots are the lengths of the row's own caches, by construction."""
        embed = self._model.embedding
        logits = []
        begins = (placement.write_index, *placement.stage_write_index)
        for number, (token, row) in enumerate(zip(token_ids_B, self._rows, strict=True)):
            stages = zip(self._pruning.stages, begins, strict=True)
            shorten(row.cache, [int(slots[number]) for stage, slots in stages for _ in stage.run])
            hidden_1X = embed(torch.tensor([int(token)]))
            given = torch.from_numpy(np.atleast_2d(placement.position_ids[..., number, :]).copy())
            for stage in self._pruning.stages:
                ids_R1 = given
                if stage.first_layer and self._pruning.positions is not PositionPolicy.GAP:
                    ids_R1 = torch.full_like(given, row.cache.get_seq_length(stage.first_layer))
                hidden_1X = self._layers(stage, hidden_1X, ids_R1, row.cache)
            logits.append(self._logits(hidden_1X))
        return np.stack(logits)

    def _free(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._decoder, self._rows = None, []
        self._maps.clear()
        super()._free()

    def _whole_prompt(self, row: _Row, counts_IJ: Ids) -> NDArray[np.float32]:
        hidden_SH = self._hidden(row.hidden_SX).double().numpy()
        images_NH = np.concatenate([hidden_SH[image] for image in row.images])
        text_TH = hidden_SH[len(hidden_SH) - row.texts[-1] :]
        queries, row.margin = self._twin.scoring_queries(self._pruning.pruner, images_NH, text_TH)
        for number, stage in enumerate(self._pruning.stages):
            if number:
                self._cut(row, stage, counts_IJ[:, number - 1], queries)
            row.hidden_SX = self._layers(stage, row.hidden_SX, row.ids_RS, row.cache)
        return self._logits(row.hidden_SX)

    def _cut(self, row: _Row, stage: Stage, kept_I: Ids, queries: list[int]) -> None:
        hidden_SH = self._hidden(row.hidden_SX)
        if (
            self._uses_next_layer_attention
        ):  # the attention of the next layer on all that is there, and nothing else of that layer
            layer = self._decoder.layers[stage.first_layer]
            layer.self_attn(
                layer.input_layernorm(hidden_SH[None]),
                position_embeddings=self._rotary(hidden_SH, row.ids_RS),
                attention_mask=self._causal(len(hidden_SH)),
            )
        attention_ASS = self._maps[
            stage.first_layer if self._uses_next_layer_attention else stage.first_layer - 1
        ][0]
        hidden_SX, places, left = row.hidden_SX, list[Tensor](), list[Ids]()
        for image, raster_N, kept in zip(row.images, row.raster_N, map(int, kept_I), strict=True):
            choice = self._twin.choose(
                self._pruning.pruner,
                attention_ASS.double().numpy(),
                hidden_SH[image].double().numpy(),
                image_start=image.start,
                rows=queries,
                kept=kept,
                merged=self._schedule.merged(len(raster_N), kept) or 0,
                carried_NX=row.hidden_SX[image].double().numpy(),
            )
            row.margin = min(row.margin, choice.margin)
            keeps_order = self._pruning.positions.keeps_raster_order
            order = np.argsort(choice.indices_K) if keeps_order else slice(None)
            places.append(image.start + torch.from_numpy(choice.indices_K[order]))
            left.append(raster_N[choice.indices_K[order]])
            if choice.patches_KE is not None:
                hidden_SX = hidden_SX.clone()
                hidden_SX[places[-1]] = torch.from_numpy(choice.patches_KE[order]).to(hidden_SX.dtype)
        ends = [0, *(image.stop for image in row.images)]
        texts = [torch.arange(end, end + text) for end, text in zip(ends, row.texts, strict=True)]
        source = torch.cat([part for pair in zip(texts, places, strict=False) for part in pair] + texts[-1:])
        row.hidden_SX, row.raster_N = hidden_SX[source], left
        if self._pruning.positions is PositionPolicy.GAP:
            row.ids_RS = row.ids_RS[:, source]
        else:
            row.ids_RS = torch.arange(len(source)).expand(len(row.ids_RS), -1)
        row.kept.append(np.concatenate(left))

    def _layers(self, stage: Stage, hidden_SX: Tensor, ids_RS: Tensor, cache: DynamicCache) -> Tensor:
        hidden_SH, *levels_SH = hidden_SX.chunk(1 + self._levels, dim=-1)
        for number in stage.run:
            hidden_SH = self._decoder.layers[number](
                hidden_SH[None],
                attention_mask=self._causal(len(hidden_SH)),
                position_ids=ids_RS[:1],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=self._rotary(hidden_SH, ids_RS),
            )[0]
            if number < self._levels:
                hidden_SH = hidden_SH + levels_SH[number]
        return torch.cat([hidden_SH, *levels_SH], dim=-1)

    def _hidden(self, hidden_SX: Tensor) -> Tensor:
        """[S, H]: without what DeepStack adds."""
        return hidden_SX.chunk(1 + self._levels, dim=-1)[0]

    def _rotary(self, hidden: Tensor, ids_RS: Tensor) -> tuple[Tensor, Tensor]:
        as_loaded(self._decoder)
        ids = ids_RS if len(ids_RS) == 1 else ids_RS[:, None]
        cos_sin: tuple[Tensor, Tensor] = self._decoder.rotary_emb(hidden[None], ids)
        return cos_sin

    def _causal(self, tokens: int) -> Tensor | None:
        """[1, 1, S, S], added to the logits of attention; a single token sees everything."""
        if tokens == 1:
            return None
        least = torch.finfo(self._model.dtype).min
        return torch.full((tokens, tokens), least, dtype=self._model.dtype).triu(1)[None, None]

    def _logits(self, hidden_SX: Tensor) -> NDArray[np.float32]:
        last_H = self._decoder.norm(self._hidden(hidden_SX)[-1])
        logits_V: NDArray[np.float32] = self._model.lm_head(last_H).float().numpy()
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
