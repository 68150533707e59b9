"""The reference: a family's own model, eager, with explicit ids, an explicit mask and our own decode loop.

Nothing of the export path is used here. The model is that of `references/`, class-token attention is read from the full
attention map, the selection is that of `prune/reference/` (float64, one image at a time), rows are run without padding, and
ids come from `positions.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from gap_export import prune
from gap_export.bundle.manifest import Pruning
from gap_export.families.reference import ImageFeatures, ReferenceModel
from gap_export.inputs.batch import PixelInputs
from gap_export.inputs.prompt import text_lengths
from gap_export.positions import PAD, AttentionMask, Ids, Placement, place, visible
from gap_export.prune import VisionFeatures, reference
from gap_export.prune.features import OnDemand
from gap_export.prune.reference import Floats
from gap_export.runtime.keep import stage_counts_of
from gap_export.runtime.session import (
    Buffer,
    Lifetime,
    Prefilled,
    Spliced,
    VisualTokens,
    check_within_bound,
    rows_of_ids,
    vision_inputs,
)
from gap_export.runtime.torch.text_reference import TextReader

_UNBOUNDED = 2**31


@dataclass
class _Group:
    """Rows of equal prompt length, and of equal ids where rotation depends on them, run together without padding."""

    rows: list[int]
    cache: DynamicCache


class TorchSession(Lifetime):
    """A checkpoint in PyTorch: the reference that bundles are compared with.

    Args:
        model: of the family.
        pruning: what to prune and how to number.
        text_tower: for pruners that look at the expression.
        mask: of the model's decoder.
    """

    backend = "torch"

    def __init__(
        self,
        model: ReferenceModel,
        pruning: Pruning,
        *,
        text_tower: TextReader | None = None,
        mask: AttentionMask = "causal",
    ) -> None:
        self._loaded: ReferenceModel | None = model
        self._pruning, self._text_tower, self._mask = pruning, text_tower, mask
        self.capacities = (_UNBOUNDED,) * max(1, len(pruning.stages))
        self._groups: list[_Group] = []
        self._forked: DynamicCache | None = None

    @property
    def _model(self) -> ReferenceModel:
        self._check_open()
        assert self._loaded is not None
        return self._loaded

    @torch.inference_mode()
    def encode(
        self,
        pixels: PixelInputs,
        *,
        text_ids_BL: Ids | None = None,
        keep_count: int | None = None,
    ) -> VisualTokens:
        """Vision tower, pruner and projector; embeddings are a list of rows [K_b, H] where images differ."""
        self._check_open()
        pruning = self._pruning
        vision_inputs(
            pruning, reads_text=self._text_tower is not None, text_ids_BL=text_ids_BL, keep_count=keep_count
        )
        batch = self._extract_features(pixels, text_ids_BL)
        choices = [self._choose(image, keep_count) for image in batch]
        adaptive = pruning.keep_mode == "adaptive"
        if pruning.finds_count:
            needed_B = np.array([choice.needed for choice in choices])
            check_within_bound(needed_B, pruning.max_tokens if keep_count is None else keep_count, pruning)
        embeds, places = zip(*map(self._model.tokens, batch, choices), strict=True)
        counts_B = np.array([len(kept_K) for kept_K in places], np.int64)
        # One score decides, and is as long for every image: what differs can be told to be a tie token by token.
        by_score = pruning.pruner == "cls_attention" and self._model.grid is not None
        scores = [image.shown.attention for image in batch] if by_score else []
        return VisualTokens(
            embeds=list(embeds) if adaptive else torch.stack(embeds),
            kept_indices=rows_of_ids(places),
            kept_counts=counts_B if adaptive else None,
            scores=np.stack([score.numpy() for score in scores if score is not None]) if scores else None,
            margins=None if scores else np.array([choice.margin for choice in choices]),
        )

    @torch.inference_mode()
    def order_of(
        self,
        pruner: str,
        pixels: PixelInputs,
        kept: int,
        *,
        grid: tuple[int, int],
        text_ids_BL: Ids | None = None,
    ) -> Ids:
        """What a pruner, this session's or another, would keep of one image.

        Args:
            pruner: its name; one that chooses before the decoder.
            pixels: of one call with one image.
            kept: K.
            grid: (rows, columns) of the visual tokens.
            text_ids_BL: [1, L], for pruners that look at the expression.

        Returns:
            [K] int64 raster indices, best first.
        """
        (image,) = self._extract_features(pixels, text_ids_BL)
        features, pruning = _in_float64(image.shown, grid=grid), self._pruning
        return reference.choose(
            pruner, features, kept, seed=pruning.seed, merged_id=pruning.merged_id
        ).indices_K

    def _extract_features(self, pixels: PixelInputs, text_ids_BL: Ids | None) -> list[ImageFeatures]:
        """What the tower gives of every image, with the expression where it is read."""
        batch, tower = self._model.extract_features(pixels), self._text_tower
        if tower is None:
            return batch
        texts = [None] * len(batch) if text_ids_BL is None else list(tower.embedded(text_ids_BL, self._model))
        return [
            replace(
                image,
                shown=prune.changed(
                    image.shown,
                    aligned=None if text_P is None else tower.aligned(image),
                    text=text_P,
                    aligned_inversely=tower.aligned_inversely,
                ),
            )
            for image, text_P in zip(batch, texts, strict=True)
        ]

    def shifted_inside(self) -> TorchSession | None:
        """This model with survivors renumbered inside the decoder, as a bundle that does so would answer; None where no token is dropped there."""
        return None

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings [1, K, H] of the images of every row as one batch [B, longest, H]; rows are not padded here."""
        self._check_open()
        return [torch.cat([part[0] for part in row]) for row in rows]

    @torch.inference_mode()
    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder; embeddings are a list of unpadded rows [S_b, H]."""
        texts_BI = text_lengths(input_ids_BT, self._model.image_token_id)
        several = visual.kept_counts if texts_BI.shape[1] > 2 else None
        rows = []
        for row, visual_KH in enumerate(visual.embeds):
            counts = [len(visual_KH)] if several is None else several[row].tolist()
            # (The placeholder's own id need not be in the table.)
            ends = (texts_BI[row] + 1).cumsum()
            texts = [
                input_ids_BT[row, end - 1 - count : end - 1]
                for end, count in zip(ends, texts_BI[row], strict=True)
            ]
            text_rows = [self._model.embedding(torch.from_numpy(ids.copy())) for ids in texts]
            turns = zip(text_rows, [*visual_KH.split(counts), visual_KH[:0]], strict=True)
            rows.append(torch.cat([piece for turn in turns for piece in turn]))
        placement = place(
            visual.kept_indices,
            text_before=texts_BI[:, 0],
            text_after=texts_BI[:, -1],
            between=texts_BI[:, 1:-1],
            kept_counts=several,
            visual_tokens=self._pruning_extent(visual),
            policy=self._pruning.positions,
            merged=self._pruning.merged,
            stage_counts=stage_counts_of(self._pruning, visual.stage_counts, len(rows)),
            grids=visual.image_grid,
        )
        return Spliced(embeds=rows, placement=placement)

    def _pruning_extent(self, visual: VisualTokens) -> Ids | int:
        """N of every image."""
        if visual.visual_counts is not None:
            return visual.visual_counts
        assert self._model.grid is not None
        return self._model.grid[0] * self._model.grid[1]

    @torch.inference_mode()
    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on."""
        self._check_open()
        self.caches_begun += 1
        alike: dict[tuple[int, int], list[int]] = {}
        for row, embeds_SH in enumerate(embeds):
            ids = placement.position_ids[..., row, : len(embeds_SH)]
            alike.setdefault((len(embeds_SH), self._longest(ids)), []).append(row)
        self._groups, self._forked = [_Group(rows, DynamicCache()) for rows in alike.values()], None
        return Prefilled(
            self._forward(
                lambda group: (
                    torch.stack([embeds[row] for row in group.rows]),
                    placement.position_ids[..., group.rows, : len(embeds[group.rows[0]])],
                ),
                placement,
            )
        )

    def fork(self, rows: int) -> None:
        """Give every one of `rows` rows the cache of the first; here the prompt is kept apart, and copied by every row that continues from it."""
        self._check_open()
        if self._forked is None:
            self._forked = self._groups[0].cache

    @torch.inference_mode()
    def extend(self, token_ids_BT: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed text after what is in the cache: logits [B, V] of each row's last token; rows of one length are run together, without padding."""
        self._check_open()
        assert self._forked is not None
        lengths = (token_ids_BT != PAD).sum(axis=1)
        self._groups = []
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length).tolist()
            cache = copy.deepcopy(self._forked)
            cache.batch_repeat_interleave(len(rows))
            self._groups.append(_Group(rows, cache))
        embed = self._model.embedding
        return self._forward(
            lambda group: (
                embed(torch.from_numpy(token_ids_BT[group.rows, : lengths[group.rows[0]]])),
                placement.position_ids[..., group.rows, : lengths[group.rows[0]]],
            ),
            placement,
        )

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew with a cache of one row in which nothing lies."""
        self._check_open()
        self.caches_begun += 1
        self._groups, self._forked = [_Group([0], DynamicCache())], None

    def grow(self, slots: Sequence[int]) -> None:
        """A cache is as long as what lies in it."""
        self._check_open()

    @torch.inference_mode()
    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings of text, a list of one row [T, H]."""
        self._check_open()
        return [self._model.embedding(torch.from_numpy(token_ids_1T[0].copy()))]

    @torch.inference_mode()
    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed text, images or both after what lies in a cache of one row: logits [1, V]."""
        self._check_open()
        (group,) = self._groups
        # Layers are as long as what lies in them, so that nothing need be said of slots.
        shorten(group.cache, [int(placement.write_index[0])])
        (embeds_SH,) = embeds
        return self._forward(lambda group: (embeds_SH[None], placement.position_ids), placement)

    @torch.inference_mode()
    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token per row: logits [B, V]; the slot is the length of the row's own cache, by construction."""
        embed = self._model.embedding
        return self._forward(
            lambda group: (
                embed(torch.from_numpy(token_ids_B[group.rows])[:, None]),
                placement.position_ids[..., group.rows, :],
            ),
            placement,
        )

    def _free(self) -> None:
        self._loaded = self._text_tower = self._forked = None
        self._groups = []

    def _forward(self, inputs_of: Any, placement: Placement) -> NDArray[np.float32]:
        logits: dict[int, NDArray[np.float32]] = {}
        for group in self._groups:
            embeds_BSH, ids_BS = inputs_of(group)
            mask = self._mask_of(group, embeds_BSH.shape[1], placement)
            as_loaded(self._model.language_model)
            out = self._model.language_model(
                inputs_embeds=embeds_BSH,
                position_ids=torch.from_numpy(np.ascontiguousarray(ids_BS)),
                attention_mask=mask,
                past_key_values=group.cache,
                use_cache=True,
            )
            last_BV = self._model.lm_head(out.last_hidden_state[:, -1]).float().numpy()
            logits.update(zip(group.rows, last_BV, strict=True))
        return np.stack([logits[row] for row in range(len(logits))])

    def _longest(self, ids_S: Ids) -> int:
        """The largest id of a row, where the frequencies of its rotation follow from it; 0 otherwise."""
        return int(ids_S.max()) if _rotary_by_length(self._model.language_model) is not None else 0

    def _mask_of(self, group: _Group, tokens: int, placement: Placement) -> Tensor:
        """What transformers takes for a mask: [B, C] int64 of the slots that are filled, or [B, 1, S, C] added to the logits."""
        seen = group.cache.get_seq_length()
        if self._mask == "causal":
            # Explicit ones: without any mask, transformers would read gaps in the ids as packed sequences.
            return torch.ones(len(group.rows), seen + tokens, dtype=torch.int64)
        assert placement.image_slots is not None
        slots_BS = np.broadcast_to(seen + np.arange(tokens), (len(group.rows), tokens))
        sees_BSC = visible(self._mask, slots_BS, seen + tokens, placement.image_slots[group.rows])
        least = torch.finfo(self._model.dtype).min
        hidden_BSC = torch.from_numpy(~sees_BSC)
        return torch.zeros(hidden_BSC.shape, dtype=self._model.dtype).masked_fill(hidden_BSC, least)[:, None]

    def _choose(self, image: ImageFeatures, keep_count: int | None) -> reference.Choice:
        """What is kept of one image, in the order in which it enters the decoder."""
        pruning = self._pruning
        pruner = "none" if pruning.stages else pruning.pruner
        features = _in_float64(image.shown)
        if pruning.finds_count:
            bound = pruning.max_tokens if keep_count is None else keep_count
            choice = reference.choose_adaptive(pruning.pruner, features, bound, merged_id=pruning.merged_id)
        else:
            choice = reference.choose(
                pruner,
                features,
                pruning.kept if keep_count is None else keep_count,
                seed=pruning.seed,
                merged_id=pruning.merged_id,
            )
        if not pruning.positions.keeps_raster_order:
            return choice
        order = np.argsort(choice.indices_K, kind="stable")
        patches_KE = None if choice.patches_KE is None else choice.patches_KE[order]
        return replace(choice, indices_K=choice.indices_K[order], patches_KE=patches_KE)


def shorten(cache: DynamicCache, slots: Sequence[int]) -> None:
    """Let a cache forget what lies behind so many slots.

    Args:
        cache: of one row.
        slots: of every layer, or of all of them.
    """
    for number, layer in enumerate(cache.layers):
        kept = slots[number] if len(slots) > 1 else slots[0]
        if layer.get_seq_length() > kept:
            layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]


def as_loaded(language_model: Any) -> None:
    """Let a decoder of transformers forget the longest request it has seen: `dynamic` would keep the frequencies of that."""
    rotary = _rotary_by_length(language_model)
    if rotary is not None:
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def _rotary_by_length(language_model: Any) -> Any:
    """A decoder's rotary embedding, where its frequencies fit the longest row of a call; None where they fit all lengths."""
    rotary = getattr(language_model, "rotary_emb", None)
    return rotary if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope") else None


def _in_float64(features: VisionFeatures[Tensor], **changes: Any) -> VisionFeatures[Floats]:
    """Features in float64, as the twins of the pruners take them; what is computed when it is read, is so here too.

    Args:
        features: of one image.
        changes: fields that are others.
    """

    def exact(name: str) -> Any:
        value = getattr(features, name)
        return value.double().numpy() if isinstance(value, Tensor) else value

    on_demand = {name for name, kind in vars(VisionFeatures).items() if isinstance(kind, OnDemand)}
    arrays: dict[str, Any] = {
        field.name: partial(exact, field.name) if field.name in on_demand else exact(field.name)
        for field in fields(features)
    }
    return VisionFeatures(**arrays | changes)
