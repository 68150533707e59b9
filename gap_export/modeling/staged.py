"""Decoders that drop visual tokens between their layers: `prefill` with the selection inside, `decode` over what is left.

Layers with the same tokens are a stage (`bundle.Stage`). Every stage has its own slots, because a token that is dropped leaves
the cache of all later layers shorter; so it has its own slot counter, and its own `write_index` when decoding. Position ids:

- `gap`: a survivor keeps its id through all stages, and all layers read the same `position_ids`.
- `shifted`, `permuted`: a later stage numbers its tokens 0.. again, so that its ids *are* its slots. In `prefill` they are
  counted, in `decode` a later stage reads its own `write_index` for an id. Stage 0 has every token: its ids have no gaps.

The layers of transformers are traced unchanged, one by one. Nobody computes an attention map: the queries of the few rows that
decide are held against the keys, once per cut.

Shape letters: B batch, S tokens of a stage, N visual tokens of the stage before, K of this one, R scoring queries, H decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gap_export.bundle.manifest import Stage
from gap_export.modeling.attention import AttentionProbe, SlotCache, slot_mask
from gap_export.modeling.rope import RowRotary, own_ids
from gap_export.modeling.splice import Splice
from gap_export.plan import Plan
from gap_export.positions import PositionPolicy
from gap_export.prune import order
from gap_export.prune.in_decoder import stages
from gap_export.prune.in_decoder.stages import Prompt, QueryRows, attention_paid
from gap_export.prune.order import take


class StagedSplice(Splice):
    """The splice of all N visual tokens; besides its counters those of the later stages, and where the image begins."""

    def __init__(self, embedding: nn.Embedding, plan: Plan, **options: Any) -> None:
        super().__init__(embedding, policy=plan.pruning.positions, **options)
        self._dropped = [plan.pruning.kept - stage.kept for stage in plan.pruning.stages[1:]]

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, visual_embeds: Tensor, kept_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What `Splice.forward` gives; then image_start [B] int64, and next_slot [B] int64 of every later stage."""
        spliced = super().forward(input_ids, visual_embeds, kept_indices)
        next_slot = spliced[-1]
        from_image_BT = (input_ids == self.image_token_id).to(torch.int64).cumsum(1)
        image_start = (1 - from_image_BT).sum(1)
        return (*spliced, image_start, *(next_slot - dropped for dropped in self._dropped))


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a stage.

    Attributes:
        hidden_BSH: hidden states.
        ids_BS: int64, what RoPE reads.
        raster_BK: int64 raster indices of the visual ones.
        dropped: how many visual tokens are gone since stage 0.
    """

    hidden_BSH: Tensor
    ids_BS: Tensor
    raster_BK: Tensor
    dropped: int = 0


class _StagedDecoder(nn.Module):
    """What both graphs have in common."""

    def __init__(self, language_model: PreTrainedModel, lm_head: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.language_model: Any = language_model
        self.language_model.embed_tokens = None  # embeddings come in; the table lives in `splice` and `embed`
        self.lm_head = lm_head
        self._keeps_ids = plan.pruning.positions is PositionPolicy.GAP
        self._stages = plan.pruning.stages

    def _rotary(
        self, hidden_BSH: Tensor, ids_BS: Tensor, prompt_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of some tokens; `prompt_BS` are the ids of all of the row, where these are not."""
        rotary = self.language_model.rotary_emb
        cos_sin: tuple[Tensor, Tensor]
        if prompt_BS is not None and isinstance(rotary, RowRotary):
            cos_sin = rotary(hidden_BSH, position_ids=ids_BS, largest_B=prompt_BS.amax(dim=1))
        else:
            cos_sin = rotary(hidden_BSH, position_ids=ids_BS)
        return cos_sin

    def _run(
        self,
        stage: Stage,
        hidden_BSH: Tensor,
        ids_BS: Tensor,
        slot_B: Tensor,
        cache: SlotCache,
        probe: AttentionProbe | None = None,
    ) -> Tensor:
        """The layers of one stage, from a slot on; `probe` looks at the last of them."""
        rotary = self._rotary(hidden_BSH, ids_BS)
        mask = slot_mask(slot_B, hidden_BSH.shape[1], cache.present[2 * stage.first_layer].shape[2])
        for number in stage.run:
            hidden_BSH = self.language_model.layers[number](
                hidden_BSH,
                attention_mask=mask,
                position_ids=ids_BS,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
                capture=probe if number == stage.run[-1] else None,
            )
        return hidden_BSH

    def _own_ids(self, ids_BS: Tensor, last_index: Tensor) -> Tensor:
        return own_ids(self.language_model.rotary_emb, ids_BS, last_index)

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        logits_BV: Tensor = self.lm_head(self.language_model.norm(hidden_BH)).float()
        return logits_BV


class Prefill(_StagedDecoder):
    """The prompt, from slot 0 on, through all stages."""

    def __init__(self, language_model: PreTrainedModel, lm_head: nn.Module, plan: Plan) -> None:
        super().__init__(language_model, lm_head, plan)
        self._pruner, self._policy = stages.load(plan.pruning.pruner), plan.pruning.positions

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        image_start: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One prompt per row.

        Args:
            inputs_embeds: [B, S, H], all N visual tokens in place, short rows padded at the end.
            position_ids: [B, S] int64.
            last_index: [B] int64: the row of S with the last real token.
            image_start: [B] int64: text tokens before the image.
            past: key and value of every layer, [B, Hkv, C, D] with the capacity of the layer's stage.

        Returns:
            logits [B, V] float32 of each row's last token; for every later stage the raster indices [B, K] int64 of its
            visual tokens, in the order in which they stand there; the updated caches.
        """
        first_slot = torch.zeros_like(last_index)
        cache, probe, kept = SlotCache(past, first_slot), AttentionProbe(), []
        visual = self._stages[0].kept
        queries = self._pruner.scoring_queries(Prompt(inputs_embeds, image_start, last_index, visual))
        raster_BN = torch.arange(visual).expand(inputs_embeds.shape[0], -1)
        tokens = _Tokens(inputs_embeds, self._own_ids(position_ids, last_index), raster_BN)
        for stage in self._stages:
            if stage.first_layer:
                scores_BN = self._scores(tokens, queries, image_start, stage.first_layer, probe)
                tokens = self._cut(tokens, stage, image_start, scores_BN)
                tokens = replace(tokens, ids_BS=self._own_ids(tokens.ids_BS, last_index - tokens.dropped))
                kept.append(tokens.raster_BK)
            probe = AttentionProbe()
            hidden_BSH = self._run(stage, tokens.hidden_BSH, tokens.ids_BS, first_slot, cache, probe)
            tokens = _Tokens(hidden_BSH, tokens.ids_BS, tokens.raster_BK, tokens.dropped)
        last_B1 = (last_index - tokens.dropped)[:, None]
        return (self._logits(take(tokens.hidden_BSH, last_B1)[:, 0]), *kept, *cache.present)

    def _scores(
        self, tokens: _Tokens, queries: QueryRows, image_start: Tensor, ahead: int, probe: AttentionProbe
    ) -> Tensor:
        """[B, N] float32: attention that the scoring queries pay to every visual token.

        Args:
            tokens: of the stage that ends.
            queries: who decides.
            image_start: [B] int64.
            ahead: the first layer of the stage that begins.
            probe: on the layer that just ran.
        """
        rows_BR = queries.rows_BR - tokens.dropped  # they stand behind the image
        if self._pruner.USES_NEXT_LAYER_ATTENTION:
            probe = self._compared_by(ahead, tokens.hidden_BSH, tokens.ids_BS)
            own = self._compared_by(
                ahead, take(tokens.hidden_BSH, rows_BR), tokens.ids_BS.gather(1, rows_BR), tokens.ids_BS
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
        return scores_BC.gather(1, image_start[:, None] + torch.arange(tokens.raster_BK.shape[1]))

    def _compared_by(
        self, number: int, hidden_BSH: Tensor, ids_BS: Tensor, prompt_BS: Tensor | None = None
    ) -> AttentionProbe:
        """Queries and keys that a layer would compare. Its attention itself goes nowhere and leaves the graph."""
        layer, probe = self.language_model.layers[number], AttentionProbe()
        layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_BSH),
            position_embeddings=self._rotary(hidden_BSH, ids_BS, prompt_BS),
            attention_mask=None,
            capture=probe,
        )
        return probe

    def _cut(self, tokens: _Tokens, stage: Stage, image_start: Tensor, scores_BN: Tensor) -> _Tokens:
        """The tokens of the stage that begins. Ids are gathered with the index that hidden states are gathered with."""
        hidden_BSH, visual, kept = tokens.hidden_BSH, scores_BN.shape[1], stage.kept
        start_B1 = image_start[:, None]
        image_BNH = take(hidden_BSH, start_B1 + torch.arange(visual))
        selected = self._pruner.select(scores_BN, image_BNH, kept=kept, merged=stage.merged)
        selected = order.in_decoder_order(selected, self._policy)
        places_BK = selected.indices_BK

        slots_S = torch.arange(hidden_BSH.shape[1] - (visual - kept))
        within_image_BS = slots_S[None] - start_B1
        is_visual_BS = (within_image_BS >= 0) & (within_image_BS < kept)
        place_BS = within_image_BS.clamp(0, kept - 1)
        text_BS = torch.where(within_image_BS >= kept, slots_S[None] + (visual - kept), slots_S[None])
        source_BS = torch.where(is_visual_BS, start_B1 + places_BK.gather(1, place_BS), text_BS)

        left_BSH = take(hidden_BSH, source_BS)
        if selected.patches_BKE is not None:
            left_BSH = torch.where(is_visual_BS[:, :, None], take(selected.patches_BKE, place_BS), left_BSH)
        ids_BS = (
            tokens.ids_BS.gather(1, source_BS) if self._keeps_ids else slots_S.expand(hidden_BSH.shape[0], -1)
        )
        return _Tokens(
            left_BSH, ids_BS, tokens.raster_BK.gather(1, places_BK), tokens.dropped + visual - kept
        )


class Decode(_StagedDecoder):
    """One token per row."""

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, write_index: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """One call.

        Args:
            inputs_embeds: [B, 1, H].
            position_ids: [B, 1] int64: what RoPE reads; in all stages under `gap`, in stage 0 under the others.
            write_index: [B] int64: the slot of the token in stage 0.
            rest: position_ids and write_index of every later stage; then key and value of every layer as in `Prefill`.

        Returns:
            logits [B, V] float32, then the updated caches.
        """
        later, past = rest[: len(self._stages) - 1], rest[len(self._stages) - 1 :]
        hidden_B1H = inputs_embeds
        present: list[Tensor] = []
        for stage, slot_B in zip(self._stages, (write_index, *later), strict=True):
            ids_B1 = position_ids if self._keeps_ids or not stage.first_layer else slot_B[:, None]
            cache = SlotCache(past, slot_B)
            hidden_B1H = self._run(stage, hidden_B1H, ids_B1, slot_B, cache)
            present += cache.present[2 * stage.run.start : 2 * stage.run.stop]
        return (self._logits(hidden_B1H[:, 0]), *present)


def decoder_modules(
    language_model: PreTrainedModel, lm_head: nn.Module, plan: Plan
) -> tuple[Prefill, Decode]:
    """Of the graphs `prefill` and `decode`.

    Args:
        language_model: of transformers, without weights.
        lm_head: hidden states to logits, without weights.
        plan: with stages.
    """
    return Prefill(language_model, lm_head, plan), Decode(language_model, lm_head, plan)
