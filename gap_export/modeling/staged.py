"""Decoders that drop visual tokens between their layers: `prefill` with the selection inside, `decode` over what is left.

Layers with the same tokens are a stage (`bundle.Stage`). Every stage has its own slots, because a token that is dropped leaves
the cache of all later layers shorter; so it has its own slot counter, and its own `write_index` when decoding. Position ids:

- `gap`: a survivor keeps its id through all stages, and all layers read the same `position_ids`.
- `shifted`, `permuted`: a later stage numbers its tokens 0.. again, so that its ids *are* its slots. In `prefill` they are
  counted, in `decode` a later stage reads its own `write_index` for an id. Stage 0 has every token: its ids have no gaps.

How many tokens of each image a stage has is a constant of the graph, or, where images differ in size or requests choose, told with
every call: `stage_counts` for each image, and `stage_slots.J`, the tokens of the longest row, as an extent. Features of DeepStack
(`ModelSpec.deepstack_levels`) that are still to be added go where their token goes.

The layers of transformers are traced unchanged, one by one. Nobody computes an attention map of the prompt: the queries of the rows that
decide, of the text at most, are held against the keys, once per cut.

Shape letters: B batch, S tokens of a stage, T of the one that begins, I images of a prompt, J later stages, R scoring queries, H decoder
width; X position ids of a token: one, or the three of M-RoPE in front of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gap_export.bundle.manifest import Stage
from gap_export.modeling.attention import AttentionProbe, SlotCache, slot_mask
from gap_export.modeling.rope import RowRotary, own_ids
from gap_export.plan import Plan
from gap_export.positions import PositionPolicy
from gap_export.prune.in_decoder import stages
from gap_export.prune.in_decoder.stages import Image, Prompt, QueryRows, attention_paid
from gap_export.prune.order import take


@dataclass(frozen=True)
class _Counts:
    """How many tokens every image of a batch has in every later stage.

    Attributes:
        kept_BI: int64, for each stage.
        most: not exceeded by any image, for each stage; symbolic where it is told.
        slots: T, the tokens of the longest row, for each stage; the same.
    """

    kept_BI: tuple[Tensor, ...]
    most: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a stage.

    Attributes:
        hidden_BSH: hidden states.
        levels_BSH: features of DeepStack, one for each of the decoder's first layers; of layers that have run, as they were.
        ids_XBS: int64, position ids.
        read_XBS: int64, what RoPE reads: the same, but for padding, which makes no row longer than it is.
        slots_BS: int64, where they stood in stage 0.
        first_BI: int64, the slot of every image's first token.
        count_BI: int64, how many tokens of every image there are.
        most: not exceeded by any of those.
        dropped_B: int64, how many tokens are gone since stage 0.
    """

    hidden_BSH: Tensor
    levels_BSH: tuple[Tensor, ...]
    ids_XBS: Tensor
    read_XBS: Tensor
    slots_BS: Tensor
    first_BI: Tensor
    count_BI: Tensor
    most: int
    dropped_B: Tensor

    def of_image(self, number: int) -> Tensor:
        """[B, S] bool: which slots hold tokens of one image."""
        within_BS = torch.arange(self.hidden_BSH.shape[1]) - self.first_BI[:, number, None]
        return (within_BS >= 0) & (within_BS < self.count_BI[:, number, None])


class _StagedDecoder(nn.Module):
    """What both graphs have in common."""

    def __init__(
        self, language_model: PreTrainedModel, lm_head: nn.Module, plan: Plan, *, deepstack_levels: int
    ) -> None:
        super().__init__()
        self.language_model: Any = language_model
        self.language_model.embed_tokens = None  # embeddings come in; the table lives in `splice` and `embed`
        self.lm_head = lm_head
        self._keeps_ids = plan.pruning.positions is PositionPolicy.GAP
        self._stages, self._levels = plan.pruning.stages, deepstack_levels

    def _rotary(
        self, hidden_BSH: Tensor, ids_XBS: Tensor, prompt_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of some tokens; `prompt_BS` are the ids of all of the row, where these are not."""
        rotary = self.language_model.rotary_emb
        cos_sin: tuple[Tensor, Tensor]
        if prompt_BS is not None and isinstance(rotary, RowRotary):
            cos_sin = rotary(hidden_BSH, position_ids=ids_XBS, largest_B=prompt_BS.amax(dim=1))
        else:
            cos_sin = rotary(hidden_BSH, position_ids=ids_XBS)
        return cos_sin

    def _run(
        self,
        stage: Stage,
        hidden_BSH: Tensor,
        ids_XBS: Tensor,
        slot_B: Tensor,
        cache: SlotCache,
        levels_BSH: Sequence[Tensor] = (),
        probe: AttentionProbe | None = None,
    ) -> Tensor:
        """The layers of one stage, from a slot on; `probe` looks at the last of them."""
        rotary = self._rotary(hidden_BSH, ids_XBS)
        mask = slot_mask(slot_B, hidden_BSH.shape[1], cache.present[2 * stage.first_layer].shape[2])
        for number in stage.run:
            hidden_BSH = self.language_model.layers[number](
                hidden_BSH,
                attention_mask=mask,
                position_ids=ids_XBS,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
                capture=probe if number == stage.run[-1] else None,
            )
            if number < len(levels_BSH):
                hidden_BSH = hidden_BSH + levels_BSH[number]
        return hidden_BSH

    def _own_ids(self, ids_XBS: Tensor, last_index: Tensor) -> Tensor:
        return own_ids(self.language_model.rotary_emb, ids_XBS, last_index)

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        logits_BV: Tensor = self.lm_head(self.language_model.norm(hidden_BH)).float()
        return logits_BV


class Prefill(_StagedDecoder):
    """The prompt, from slot 0 on, through all stages."""

    def __init__(
        self, language_model: PreTrainedModel, lm_head: nn.Module, plan: Plan, *, deepstack_levels: int
    ) -> None:
        super().__init__(language_model, lm_head, plan, deepstack_levels=deepstack_levels)
        self._pruner, self._policy = stages.load(plan.pruning.pruner), plan.pruning.positions
        self._told, self._images, self._max_text = (
            plan.pruning.stage_counts_are_told,
            plan.images,
            plan.max_text,
        )

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        image_slots: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """One prompt per row.

        Args:
            inputs_embeds: [B, S, (1 + deepstack_levels) * H], all visual tokens in place, short rows padded at the end.
            position_ids: [B, S] int64 (M-RoPE [3, B, S]).
            last_index: [B] int64: the row of S with the last real token.
            image_slots: [B, I, 2] int64, the first slot of every image and the one after its last.
            rest: where counts are told, stage_counts [B, I, J] int64, the visual tokens of every image in every later stage, and for each of those
                stage_slots [T] int64 counting from 0, traced for its extent, the tokens of the longest row; then key and value of every layer,
                [B, Hkv, C, D] with the capacity of the layer's stage.

        Returns:
            logits [B, V] float32 of each row's last token; for every later stage the slots [B, T] int64 that its tokens had in stage 0, in the
            order in which they stand there; the updated caches.
        """
        later = len(self._stages) - 1
        told, past = (rest[: 1 + later], rest[1 + later :]) if self._told else ((), rest)
        embeds_BSH, *levels_BSH = inputs_embeds.chunk(1 + self._levels, dim=-1)
        first_BI, count_BI = image_slots[:, :, 0], image_slots[:, :, 1] - image_slots[:, :, 0]
        length = embeds_BSH.shape[1]
        tokens = _Tokens(
            embeds_BSH,
            tuple(levels_BSH),
            position_ids,
            self._own_ids(position_ids, last_index),
            torch.arange(length).expand(embeds_BSH.shape[0], -1),
            first_BI,
            count_BI,
            length if self._told else self._stages[0].kept,
            torch.zeros_like(last_index),
        )
        counts = self._counts(tokens, told)
        first_slot = torch.zeros_like(last_index)
        cache, probe, kept = SlotCache(past, first_slot), AttentionProbe(), []
        queries = self._pruner.scoring_queries(self._prompt(tokens, last_index))
        for number, stage in enumerate(self._stages):
            if number:
                scores_BS = self._scores(tokens, queries, stage.first_layer, probe)
                tokens = self._cut(tokens, counts, number - 1, scores_BS, last_index)
                kept.append(tokens.slots_BS)
            probe = AttentionProbe()
            hidden_BSH = self._run(
                stage, tokens.hidden_BSH, tokens.read_XBS, first_slot, cache, tokens.levels_BSH, probe
            )
            tokens = replace(tokens, hidden_BSH=hidden_BSH)
        last_B1 = (last_index - tokens.dropped_B)[:, None]
        return (self._logits(take(tokens.hidden_BSH, last_B1)[:, 0]), *kept, *cache.present)

    def _counts(self, tokens: _Tokens, told: Sequence[Tensor]) -> _Counts:
        """What is told, or constants of the graph."""
        length = tokens.hidden_BSH.shape[1]
        if not told:
            kept = tuple(stage.kept for stage in self._stages[1:])
            return _Counts(
                tuple(torch.zeros_like(tokens.count_BI) + count for count in kept),
                kept,
                tuple(length - self._images * (tokens.most - count) for count in kept),
            )
        counts_BIJ, *slots = told
        extents = tuple(slots_T.shape[0] for slots_T in slots)
        return _Counts(counts_BIJ.unbind(-1), extents, extents)

    def _prompt(self, tokens: _Tokens, last_index: Tensor) -> Prompt:
        is_image_BS = tokens.of_image(0)
        for number in range(1, self._images):
            is_image_BS = is_image_BS | tokens.of_image(number)
        length = tokens.hidden_BSH.shape[1]
        # (A constant where counts are told: what is behind the images follows from no extent then.)
        most_text = self._max_text + 1 if self._told else length - self._images * tokens.most + 1
        end_B = tokens.first_BI[:, -1] + tokens.count_BI[:, -1]
        return Prompt(tokens.hidden_BSH, is_image_BS, end_B, last_index, most_text)

    def _scores(self, tokens: _Tokens, queries: QueryRows, ahead: int, probe: AttentionProbe) -> Tensor:
        """[B, S] float32: attention that the scoring queries pay to every token.

        Args:
            tokens: of the stage that ends.
            queries: who decides.
            ahead: the first layer of the stage that begins.
            probe: on the layer that just ran.
        """
        rows_BR = queries.rows_BR - tokens.dropped_B[:, None]  # they stand behind the images
        if self._pruner.USES_NEXT_LAYER_ATTENTION:
            probe = self._compared_by(ahead, tokens.hidden_BSH, tokens.read_XBS)
            own = self._compared_by(
                ahead, take(tokens.hidden_BSH, rows_BR), _picked(tokens.read_XBS, rows_BR), tokens.read_XBS
            )
            query_BHRD = own.query_BHSD
        else:
            assert probe.query_BHSD is not None
            index_BHRD = rows_BR[:, None, :, None].expand(
                -1, probe.query_BHSD.shape[1], -1, probe.query_BHSD.shape[3]
            )
            query_BHRD = probe.query_BHSD.gather(2, index_BHRD)
        assert query_BHRD is not None
        assert probe.key_BGCD is not None
        paid_BRC = attention_paid(query_BHRD, probe.key_BGCD, rows_BR, probe.scale)
        scores_BC = (queries.weights_BR[:, :, None] * paid_BRC).sum(dim=1)
        slots_S = torch.arange(tokens.hidden_BSH.shape[1])
        return scores_BC.gather(1, slots_S.expand(scores_BC.shape[0], -1))

    def _compared_by(
        self, number: int, hidden_BSH: Tensor, ids_XBS: Tensor, prompt_BS: Tensor | None = None
    ) -> AttentionProbe:
        """Queries and keys that a layer would compare. Its attention itself goes nowhere and leaves the graph."""
        layer, probe = self.language_model.layers[number], AttentionProbe()
        layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_BSH),
            position_embeddings=self._rotary(hidden_BSH, ids_XBS, prompt_BS),
            attention_mask=None,
            capture=probe,
        )
        return probe

    def _cut(
        self, tokens: _Tokens, counts: _Counts, later: int, scores_BS: Tensor, last_index: Tensor
    ) -> _Tokens:
        """The tokens of the stage that begins. Ids are gathered with the index that hidden states are gathered with.

        Args:
            tokens: of the stage that ends.
            counts: of all later stages.
            later: which of them begins.
            scores_BS: by which tokens are chosen.
            last_index: [B] int64, in stage 0.
        """
        kept_BI = counts.kept_BI[later]
        length, slots_S = tokens.hidden_BSH.shape[1], torch.arange(tokens.hidden_BSH.shape[1])
        # What stays is sorted by these keys: text and visual tokens by their slots, what is dropped behind all.
        keys_BS, mergings = slots_S.expand(scores_BS.shape[0], -1), []
        for number in range(self._images):
            kept_B = kept_BI[:, number]
            image = Image(
                tokens.of_image(number),
                tokens.count_BI[:, number],
                kept_B,
                most_kept=counts.most[later],
                most_before=tokens.most,
            )
            chosen = self._pruner.select(scores_BS, tokens.hidden_BSH, image)
            mergings += [chosen.merging] if chosen.merging is not None else []
            stays_BS = chosen.ranks_BS < kept_B[:, None]
            ranked_BS = tokens.first_BI[:, number, None] + chosen.ranks_BS
            own_BS = slots_S[None] if self._policy.keeps_raster_order else ranked_BS
            keys_BS = torch.where(
                image.is_mine_BS, torch.where(stays_BS, own_BS, slots_S[None] + length), keys_BS
            )
        sorted_BT = keys_BS.topk(counts.slots[later], dim=-1, largest=False)
        # A short row is filled up with what follows it.
        source_BT = (
            sorted_BT.values.clamp(max=length - 1) if self._policy.keeps_raster_order else sorted_BT.indices
        )

        def left(features_BSH: Tensor) -> Tensor:
            for merging in mergings:
                features_BSH = merging.of(features_BSH)
            return take(features_BSH, source_BT)

        gone_BI = tokens.count_BI - kept_BI
        dropped_B = tokens.dropped_B + gone_BI.sum(dim=1)
        if self._keeps_ids:
            ids_XBT = _picked(tokens.ids_XBS, source_BT)
        else:
            ids_XBT = torch.arange(source_BT.shape[1]).expand(*tokens.ids_XBS.shape[:-1], -1)
        return _Tokens(
            left(tokens.hidden_BSH),
            tuple(
                left(level_BSH) if number >= self._stages[later + 1].first_layer else level_BSH
                for number, level_BSH in enumerate(tokens.levels_BSH)
            ),
            ids_XBT,
            self._own_ids(ids_XBT, last_index - dropped_B),
            tokens.slots_BS.gather(1, source_BT),
            tokens.first_BI - (gone_BI.cumsum(dim=1) - gone_BI),
            kept_BI,
            counts.most[later],
            dropped_B,
        )


class Decode(_StagedDecoder):
    """One token per row."""

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, write_index: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """One call.

        Args:
            inputs_embeds: [B, 1, (1 + deepstack_levels) * H]; text has nothing to add between the layers.
            position_ids: [B, 1] int64 (M-RoPE [3, B, 1]): what RoPE reads; in all stages under `gap`, in stage 0 under the others.
            write_index: [B] int64: the slot of the token in stage 0.
            rest: write_index of every later stage; then key and value of every layer as in `Prefill`.

        Returns:
            logits [B, V] float32, then the updated caches.
        """
        later, past = rest[: len(self._stages) - 1], rest[len(self._stages) - 1 :]
        hidden_B1H, *_ = inputs_embeds.chunk(1 + self._levels, dim=-1)
        present: list[Tensor] = []
        for stage, slot_B in zip(self._stages, (write_index, *later), strict=True):
            renumbered = stage.first_layer and not self._keeps_ids
            ids_XB1 = slot_B[:, None].expand(position_ids.shape) if renumbered else position_ids
            cache = SlotCache(past, slot_B)
            hidden_B1H = self._run(stage, hidden_B1H, ids_XB1, slot_B, cache)
            present += cache.present[2 * stage.run.start : 2 * stage.run.stop]
        return (self._logits(hidden_B1H[:, 0]), *present)


def decoder_modules(
    language_model: PreTrainedModel, lm_head: nn.Module, plan: Plan, *, deepstack_levels: int = 0
) -> tuple[Prefill, Decode]:
    """Of the graphs `prefill` and `decode`.

    Args:
        language_model: of transformers, without weights.
        lm_head: hidden states to logits, without weights.
        plan: with stages.
        deepstack_levels: how many features of DeepStack lie behind each embedding.
    """
    return (
        Prefill(language_model, lm_head, plan, deepstack_levels=deepstack_levels),
        Decode(language_model, lm_head, plan, deepstack_levels=deepstack_levels),
    )


def _picked(ids_XBS: Tensor, index_BT: Tensor) -> Tensor:
    """[X, B, T]: ids of some tokens, in all their rows."""
    return ids_XBS.gather(-1, index_BT.expand(*ids_XBS.shape[:-1], -1))
