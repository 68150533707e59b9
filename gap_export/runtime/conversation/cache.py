"""A conversation in a session's cache: read once, continued token by token, cut off where it changed, and read again where another answer took the cache.

Images are encoded once and kept as the decoder takes them. What is read of a prompt is what does not lie in the cache yet: a turn of text is one call
of the decoder, an image and the text around it one call of the splice graph and one of the decoder. A decoder that drops tokens reads its image with the
whole first prompt, and all later text token by token, as its graph for single tokens has the slots of every stage.

Where frequencies of the rotation follow the length of what is read, a conversation beyond the trained length is read anew with every question, all of it
with the frequencies of its last token, in however many calls: to each but the last a token is added that stands where the conversation ends. None of the
others sees it, and the next call writes over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.manifest import Manifest
from gap_export.errors import InputError
from gap_export.inputs.batch import ImageBatch, PixelInputs
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.positions import Ids, Placement, PositionPolicy
from gap_export.runtime.conversation.context import Context, moved, reaching, text_placement
from gap_export.runtime.generate import encode
from gap_export.runtime.keep import KeepCounts
from gap_export.runtime.session import Buffer, Prefilled, Spliced, VisualTokens


@dataclass
class SeenImages:
    """Images that one call of the splice graph takes: as many as the bundle's prompt has.

    Attributes:
        batch: of them.
        keep_counts: what the graphs are told.
        text_ids: [1, L] int64, for pruners that read text.
        visual: what the vision graph gave, once it was asked.
    """

    batch: ImageBatch
    keep_counts: KeepCounts | None = None
    text_ids: Ids | None = None
    visual: VisualTokens | None = None

    def kept(self, manifest: Manifest) -> list[int]:
        """How many tokens of every image enter the decoder: exactly, or at most, where the image itself decides and was not encoded yet."""
        pruning, images = manifest.pruning, len(self.batch.visual_tokens)
        if self.visual is not None:
            real = int((self.visual.kept_indices[0] >= 0).sum())
            counts = self.visual.kept_counts
            return [real] if images == 1 or counts is None else [int(count) for count in counts.reshape(-1)]
        if pruning.keep_mode == "adaptive":
            return [pruning.max_tokens] * images
        told = self.keep_counts or KeepCounts((None,) * images)
        return told.entering(self.batch, pruning.kept)

    def kept_indices(self) -> list[Ids]:
        """[K] int64 raster indices of what was kept of every image; nothing before it was encoded."""
        if self.visual is None:
            return []
        kept_K: Ids = self.visual.kept_indices[0]
        kept_K, counts = kept_K[kept_K >= 0], self.visual.kept_counts
        if counts is None or counts.ndim == 1:
            return [kept_K]
        return np.split(kept_K, counts[0].cumsum()[:-1])

    def extents(self, manifest: Manifest) -> list[int]:
        """By how much every image moves positions."""
        if manifest.pruning.positions is not PositionPolicy.GAP:
            return self.kept(manifest)
        return self.unpruned_extents()

    def unpruned_extents(self) -> list[int]:
        """By how much every image would move positions if nothing was pruned."""
        grids = self.batch.grids
        of_images = self.batch.visual_tokens if grids is None else grids.max(axis=1)
        return [int(extent) for extent in of_images]


class PromptReader(Protocol):
    """What a conversation is read by: a session with a cache of one row, or one row of several; all as of `Session`."""

    @property
    def caches_begun(self) -> int:
        """How often the cache was begun anew."""
        ...

    def encode(
        self, pixels: PixelInputs, *, text_ids_BL: Ids | None = None, keep_count: int | None = None
    ) -> VisualTokens:
        """Vision tower, pruner and projector."""
        ...

    def embeds_together(self, rows: Sequence[Sequence[Buffer]], longest: int) -> Buffer:
        """Embeddings of several images as one."""
        ...

    def splice(self, input_ids_BT: Ids, visual: VisualTokens) -> Spliced:
        """Put the kept visual tokens in place of the placeholder."""
        ...

    def embed(self, token_ids_1T: Ids) -> Buffer:
        """Embeddings of text."""
        ...

    def clear(self, slots: Sequence[int]) -> None:
        """Begin anew, with nothing in the cache."""
        ...

    def grow(self, slots: Sequence[int]) -> None:
        """Make space for so many slots of every stage."""
        ...

    def prefill(self, embeds: Buffer, placement: Placement, *, reserve: int | None = None) -> Prefilled:
        """Fill the cache from slot 0 on."""
        ...

    def append(self, embeds: Buffer, placement: Placement) -> NDArray[np.float32]:
        """Feed after what lies in the cache."""
        ...

    def step(self, token_ids_B: Ids, placement: Placement) -> NDArray[np.float32]:
        """Feed one token."""
        ...


def check_fits(manifest: Manifest, ids: Sequence[int], seen: Sequence[SeenImages], new_tokens: int) -> None:
    """Refuse a conversation that is too long, before anything of it is encoded.

    Args:
        manifest: of the bundle.
        ids: of the conversation, `IMAGE` for every image.
        seen: its images.
        new_tokens: of the answer, at most; the last one is not read.

    Raises:
        InputError: it does not fit into the cache, or reaches beyond the positions that the model knows, with the numbers; or it has an
            image that this bundle cannot take at its place.
    """
    if reads_whole_prompt(manifest) and len(seen) > 1:
        raise _stands_too_late(manifest)
    text = sum(id_ != IMAGE for id_ in ids)
    visual = sum(sum(each.kept(manifest)) for each in seen)
    needed, capacity = text + visual + new_tokens - 1, manifest.capacity
    of_stages = _lengths(manifest, seen, needed)
    for least, most in zip(of_stages, manifest.cache_layout.capacities, strict=True):
        if least > most:  # a later stage may be full before the first one is
            needed, capacity = least, most
    if needed > capacity:
        raise InputError(
            f"has {text} text tokens and {visual} visual tokens, and with {new_tokens} new tokens needs {needed} slots of a cache of {capacity}",
            subject="the conversation",
            hint="ask for fewer new tokens, begin a new conversation, or build with a larger --max-text",
        )
    longest = _length(ids, seen) + new_tokens
    known = manifest.spec.max_positions
    if longest > known:
        raise InputError(
            f"reaches position {longest} with {new_tokens} new tokens (unpruned), and the model knows {known}",
            subject="the conversation",
            hint="ask for fewer new tokens, or begin a new conversation",
        )


class ConversationCache:
    """What of a conversation lies in a session's cache.

    Args:
        session: that reads it.
        manifest: of its bundle.
    """

    def __init__(self, session: PromptReader, manifest: Manifest) -> None:
        self._session, self._manifest = session, manifest
        self._stages = max(1, len(manifest.pruning.stages))
        self._whole_prompt = reads_whole_prompt(manifest)
        self._longest_text = _longest_text(manifest)
        self._context = Context.empty(self._stages)
        self._held: list[SeenImages] = []
        self._begun: int | None = None
        self._image_slots: Ids | None = None
        self._first_prompt: tuple[int, ...] = ()
        self._first_seen: SeenImages | None = None
        # Position of the last token of what was read, where frequencies follow it.
        self._reach: int | None = None

    @property
    def context(self) -> Context:
        """What was read last, whether the cache still holds it or not."""
        return self._context

    @property
    def image_slots(self) -> Ids | None:
        """[1, I, 2] int64 of the images that were read, where the attention mask looks at them."""
        return self._image_slots

    def copied_to(self, session: PromptReader) -> ConversationCache:
        """Of another cache, into which the same was copied.

        Args:
            session: that has it.
        """
        other = ConversationCache(session, self._manifest)
        other._context, other._held, other._first_prompt = self._context, list(self._held), self._first_prompt
        other._begun, other._image_slots = session.caches_begun, self._image_slots
        other._reach, other._first_seen = self._reach, self._first_seen
        return other

    def read(
        self,
        ids: Sequence[int],
        seen: Sequence[SeenImages],
        new_tokens: int,
        *,
        answered: Sequence[int] = (),
    ) -> NDArray[np.float32]:
        """Read a conversation, as far as it does not lie in the cache yet.

        Args:
            ids: of the conversation, `IMAGE` for every image.
            seen: its images, each encoded at most once.
            new_tokens: how many will follow at most.
            answered: what follows already, of an answer that was begun.

        Returns:
            [V] float32, logits of its last token.

        Raises:
            InputError: an image that this bundle cannot take at its place.
            SessionError: the runtime failed.
        """
        for each in seen:
            self.encode(each)
        trained, length = self._manifest.spec.scaled_beyond, _length(ids, seen)
        if answered and (trained is None or length + len(answered) <= trained):
            return self.read([*ids, *answered], seen, new_tokens)
        if answered:  # (each of those was turned by the frequencies of its own length)
            logits = self.read(ids, seen, new_tokens + len(answered))
            for id_ in answered:
                logits = self.step(id_)
            return logits
        common = self._usable(ids, seen)
        self._reach = None
        if trained is not None and length > trained and self._stages == 1:
            positions = sum(sum(each.extents(self._manifest)) for each in seen)
            self._reach = sum(id_ != IMAGE for id_ in ids) + positions - 1
        self._context = self._context.cut(common)
        self._held = self._held[: self._images_before(common)]
        if not self._held:
            self._image_slots = self._no_slots()
        slots = self._slots(ids, seen, new_tokens)
        begun, self._begun = self._begun, None  # if this fails, how far it came is not known
        if common:
            self._session.grow(slots)
        logits = self._read(ids[common:], seen[self._images_before(common) :], slots)
        self._begun = self._session.caches_begun if begun is None or not common else begun
        return logits

    def step(self, id_: int) -> NDArray[np.float32]:
        """Read one more token: [V] float32 logits, overwritten by the next call."""
        at = self._context.end
        placement = text_placement(at, 1, self._manifest.spec.position_rows, self._image_slots)
        logits: NDArray[np.float32] = self._session.step(np.array([id_], np.int64), placement)[0]
        self._context = self._context.with_text([id_])
        return logits

    @property
    def lost(self) -> bool:
        """Whether the cache holds something else by now, or nothing."""
        return self._begun is None or self._begun != self._session.caches_begun

    def encode(self, seen: SeenImages) -> VisualTokens:
        """What the vision graph gives of images; it is asked once."""
        if seen.visual is None:
            seen.visual = encode(
                self._session, seen.batch, text_ids_BL=seen.text_ids, keep_counts=seen.keep_counts
            )
        return seen.visual

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._begun = None

    def _usable(self, ids: Sequence[int], seen: Sequence[SeenImages]) -> int:
        """How many tokens of a conversation lie in the cache and can stay; its last one is always read, as its logits are wanted."""
        trained = self._manifest.spec.scaled_beyond
        scaled = self._reach is not None or (trained is not None and _length(ids, seen) > trained)
        if self.lost or scaled:
            return 0  # (frequencies of the rotation follow the length there, and keys of before do not fit)
        common = self._with_whole_calls(min(self._context.common(ids), len(ids) - 1), seen)
        if self._whole_prompt and seen and not self._images_before(common):
            return 0  # (what its image needs is laid out for the whole of it)
        return common if common >= len(self._first_prompt) else 0

    def _with_whole_calls(self, common: int, seen: Sequence[SeenImages]) -> int:
        """So many tokens, or fewer: up to the first call whose images are others, or not all among them."""
        places = [place for place, id_ in enumerate(self._context.ids[:common]) if id_ == IMAGE]
        calls = self._images_before(common)
        same = (
            number for number in range(calls) if number >= len(seen) or self._held[number] is not seen[number]
        )
        first = next(same, calls) * self._manifest.prompt.images
        return places[first] if first < len(places) else common

    def _no_slots(self) -> Ids | None:
        """[1, I, 2] int64, where images lie of which there are none; None where the attention mask does not look at them."""
        reads = self._manifest.spec.reads_image_slots
        return np.zeros((1, self._manifest.prompt.images, 2), np.int64) if reads else None

    def _images_before(self, token: int) -> int:
        """How many calls' images lie before a token."""
        return self._context.ids[:token].count(IMAGE) // self._manifest.prompt.images

    def _slots(self, ids: Sequence[int], seen: Sequence[SeenImages], new_tokens: int) -> list[int]:
        """Of every stage, what the conversation and its answer take; never more than there are."""
        text = sum(id_ != IMAGE for id_ in ids)
        whole = text + sum(sum(each.kept(self._manifest)) for each in seen) + new_tokens
        lengths = _lengths(self._manifest, seen, whole)
        capacities = self._manifest.cache_layout.capacities
        return [min(length, most) for length, most in zip(lengths, capacities, strict=True)]

    def _read(
        self, ids: Sequence[int], seen: Sequence[SeenImages], slots: Sequence[int]
    ) -> NDArray[np.float32]:
        """Feed tokens after what lies in the cache."""
        generated, per_call = self._manifest.prompt.image_token_id, self._manifest.prompt.images
        unread, logits = list(ids), np.zeros(0, np.float32)
        if not self._context.ids:
            first = unread.index(IMAGE) if seen else len(unread)
            # Prompts that begin with text are spliced together with their image, unless the placeholder is a word in it, or it is long.
            long = first + per_call > self._longest_call and not self._whole_prompt
            if generated in unread[:first] or not seen or long:
                self._session.clear(slots)
                if first:
                    logits = self._read_text(unread[:first], follows=bool(seen))
                    unread = unread[first:]
        for each in seen:
            first = unread.index(IMAGE)
            if self._context.ids and self._whole_prompt:
                raise _stands_too_late(self._manifest)
            if self._context.ids and first:
                self._read_text(unread[:first], follows=True)
                unread = unread[first:]
            end = self._end_of_call(unread, each, generated)
            logits = self._read_images(unread[:end], each, slots, ends=end == len(unread))
            unread = unread[end:]
        return self._read_text(unread) if unread else logits

    def _end_of_call(self, ids: Sequence[int], seen: SeenImages, generated: int) -> int:
        """How many tokens are spliced with images: up to the next image, or the placeholder as a word, or the end of the first prompt.

        Args:
            ids: not read yet.
            seen: images of one call; there are at least so many among the ids.
            generated: id of the placeholder.
        """
        images = self._manifest.prompt.images
        places = [place for place, id_ in enumerate(ids) if id_ == IMAGE]
        last = places[images - 1]
        end = places[images] if len(places) > images else len(ids)
        words = (place for place in range(last, end) if ids[place] == generated)
        end = next(words, end)
        if not self._whole_prompt:
            end = min(end, max(last + 1, self._longest_call))
        if self._stages == 1:
            return end
        # What the stages keep follows from the first prompt, also where the whole conversation is read again.
        known = self._first_prompt
        if self._first_seen is not seen or tuple(ids[: len(known)]) != known:
            self._first_prompt, self._first_seen = tuple(ids[:end]), seen
        return len(self._first_prompt)

    @property
    def _longest_call(self) -> int:
        """Text tokens of one call, with a place for the one that says how far the conversation reaches."""
        return self._longest_text if self._reach is None else max(1, self._longest_text - 1)

    def _read_images(
        self, ids: Sequence[int], seen: SeenImages, slots: Sequence[int], *, ends: bool
    ) -> NDArray[np.float32]:
        """Feed text with as many images as one call of the splice graph takes; `ends` where nothing follows it."""
        session, manifest, at = self._session, self._manifest, self._context.end
        begins = not self._context.ids
        token = manifest.prompt.image_token_id
        reach = None if ends else self._reach
        fed = [token if id_ == IMAGE else id_ for id_ in ids] + [0] * (reach is not None)
        spliced = session.splice(np.array([fed], np.int64), self.encode(seen))
        placement = moved(spliced.placement, at)
        following = placement
        if reach is not None:
            following = replace(
                placement, next_position=placement.next_position - 1, next_slot=placement.next_slot - 1
            )
            placement = reaching(placement, reach)
        if begins:
            written = zip(slots, placement.slots_of_stages, strict=True)
            reserve = max(int(wanted - slot[0]) for wanted, slot in written)
            logits = session.prefill(spliced.embeds, placement, reserve=max(reserve, 0)).logits
        else:
            logits = session.append(spliced.embeds, placement)
        if manifest.spec.reads_image_slots:
            self._image_slots = placement.image_slots
        self._context = self._context.with_images(ids, following, seen.kept(manifest), seen.extents(manifest))
        self._held.append(seen)
        last: NDArray[np.float32] = logits[0]
        return last

    def _read_text(self, ids: Sequence[int], *, follows: bool = False) -> NDArray[np.float32]:
        """Feed text; `follows` where an image does."""
        if self._stages > 1:
            logits = np.zeros(0, np.float32)
            for id_ in ids:
                logits = self.step(id_)
            return logits
        session, rows, longest = self._session, self._manifest.spec.position_rows, self._longest_call
        last = np.zeros(0, np.float32)
        for first in range(0, len(ids), longest):
            part = ids[first : first + longest]
            reach = None if first + longest >= len(ids) and not follows else self._reach
            fed = [*part, *([0] * (reach is not None))]
            placement = text_placement(self._context.end, len(fed), rows, self._image_slots)
            if reach is not None:
                placement = reaching(placement, reach)
            last = session.append(session.embed(np.array([fed], np.int64)), placement)[0]
            self._context = self._context.with_text(part)
        return last


def reads_whole_prompt(manifest: Manifest) -> bool:
    """Whether an image must be read with the first prompt, in one call."""
    return bool(manifest.pruning.stages) or manifest.spec.reads_image_slots


def _stands_too_late(manifest: Manifest) -> InputError:
    """What refuses an image that must be read with the first prompt, and cannot be."""
    because = (
        f"{manifest.pruning.pruner} drops tokens inside the decoder, by the whole first prompt"
        if manifest.pruning.stages
        else f"the attention mask ({manifest.spec.attention_mask}) is laid out for the images of the first prompt"
    )
    return InputError(
        f"stands behind other text or in a later turn, and {because}",
        subject="an image",
        hint="give all images with the first question, or begin a new conversation",
    )


def _longest_text(manifest: Manifest) -> int:
    """Tokens that one call of the graphs takes."""
    (text,) = (tensor.shape[-1] for tensor in manifest.graphs["embed"].spec.inputs)
    return text if isinstance(text, int) else text.maximum


def _lengths(manifest: Manifest, seen: Sequence[SeenImages], length: int) -> list[int]:
    """Tokens of every stage, of a conversation that has `length` in the first."""
    layout = manifest.cache_layout
    if not seen:
        return [length] * len(layout.runs)
    counts = seen[0].keep_counts
    return layout.lengths_of(length, None if counts is None else counts.gone(seen[0].batch))


def _length(ids: Sequence[int], seen: Sequence[SeenImages]) -> int:
    """Positions that a conversation has before pruning."""
    return sum(id_ != IMAGE for id_ in ids) + sum(sum(each.unpruned_extents()) for each in seen)
