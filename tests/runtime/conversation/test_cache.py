"""What lies in a cache after a conversation was read, cut off, lost and read again, against the same read once.

The session is a fake: its cache is a list of what was written where, and its logits are what it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.bundle.cache_layout import CacheLayout, CacheRun
from gap_export.errors import InputError
from gap_export.inputs.batch import ImageBatch, of_one_size
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.positions import Placement, PositionPolicy, place
from gap_export.runtime.conversation.cache import ConversationCache, SeenImages, check_fits
from gap_export.runtime.keep import KeepCounts
from gap_export.runtime.session import Prefilled, Spliced, VisualTokens

PLACEHOLDER, VISUAL, LONGEST, CAPACITY = 7, 5, 6, 200


@dataclass(frozen=True)
class Kind:
    """Of a bundle.

    Attributes:
        images: of one call of the splice graph.
        left: visual tokens in later stages of a decoder that drops some.
        blocks: whether the attention mask looks at where images are.
        mrope: whether position ids have three rows.
    """

    images: int = 1
    left: tuple[int, ...] = ()
    blocks: bool = False
    mrope: bool = False

    @property
    def whole_prompt(self) -> bool:
        return bool(self.left) or self.blocks


KINDS = {
    "plain": Kind(),
    "two images": Kind(images=2),
    "three rows": Kind(mrope=True),
    "stages": Kind(left=(2, 1)),
    "blocks": Kind(blocks=True),
}


def manifest_of(kind: Kind) -> Any:
    runs = tuple(CacheRun(layers=1, capacity=CAPACITY, dropped=0) for _ in (0, *kind.left))
    text = SimpleNamespace(maximum=LONGEST)
    return SimpleNamespace(
        pruning=SimpleNamespace(
            stages=tuple(range(1 + len(kind.left))) if kind.left else (),
            positions=PositionPolicy.GAP,
            keep_mode="fixed",
            kept=3,
            max_tokens=3,
            pruner="fastv",
        ),
        prompt=SimpleNamespace(image_token_id=PLACEHOLDER, images=kind.images),
        spec=SimpleNamespace(
            reads_image_slots=kind.blocks,
            attention_mask="image_blocks" if kind.blocks else "causal",
            position_rows=3 if kind.mrope else 1,
            scaled_beyond=None,
            max_positions=400,
        ),
        graphs={"embed": SimpleNamespace(spec=SimpleNamespace(inputs=[SimpleNamespace(shape=(1, text))]))},
        cache_layout=CacheLayout(runs, static=False),
        capacity=CAPACITY,
    )


@dataclass
class Embeds:
    """What is read: a token each, text as its id, an image's as (image, raster index)."""

    tokens: list[Any]
    first_of_images: int = 0


class FakeSession:
    """One cache for every stage, each a list of (token, its position ids)."""

    backend = "fake"

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.caches: list[list[Any]] = [[] for _ in (0, *kind.left)]
        self.caches_begun = 0
        self.longest = 0
        self.slots: list[int] = []

    def encode(self, *_: object, **__: object) -> VisualTokens:
        raise AssertionError("images of this test are encoded already")

    def splice(self, input_ids_1T: Any, visual: VisualTokens) -> Spliced:
        ids = input_ids_1T[0].tolist()
        self.longest = max(self.longest, len(ids))
        seen: list[list[Any]] = visual.embeds  # type: ignore[assignment]
        places = [number for number, id_ in enumerate(ids) if id_ == PLACEHOLDER]
        assert len(places) == len(seen), "a placeholder that is a word was spliced"
        tokens: list[Any] = []
        for number, id_ in enumerate(ids):
            tokens += seen[places.index(number)] if number in places else [id_]
        gaps = [after - before - 1 for before, after in pairwise(places)]
        placement = place(
            visual.kept_indices,
            text_before=np.array([places[0]]),
            text_after=np.array([len(ids) - 1 - places[-1]]),
            between=np.array([gaps], np.int64).reshape(1, -1),
            visual_tokens=np.full((1, len(places)), VISUAL),
            kept_counts=np.full((1, len(places)), 3),
            policy=PositionPolicy.GAP,
            stage_counts=np.array(self.kind.left, np.int64).reshape(1, 1, -1) if self.kind.left else None,
            grids=np.full((1, len(places), 2), (1, VISUAL)) if self.kind.mrope else None,
        )
        return Spliced(Embeds(tokens, places[0]), placement)  # type: ignore[arg-type]

    def clear(self, slots: Sequence[int]) -> None:
        self.caches_begun += 1
        self.caches = [[] for _ in self.caches]
        self.slots = list(slots)

    def grow(self, slots: Sequence[int]) -> None:
        self.slots = [max(pair) for pair in zip(self.slots, slots, strict=True)]

    def prefill(self, embeds: Any, placement: Placement, *, reserve: int) -> Prefilled:
        self.clear([int(slot[0]) + reserve for slot in placement.slots_of_stages])
        whole = list(zip(embeds.tokens, by_token(placement), strict=True))
        first = embeds.first_of_images
        # What later stages keep depends on the whole prompt.
        chosen = hash(tuple(map(repr, embeds.tokens))) % 3
        for cache, left in zip(self.caches, (3, *self.kind.left), strict=True):
            kept = whole[first : first + 3]
            kept = kept if left == 3 else [(each, chosen) for each in kept[:left]]
            cache += [*whole[:first], *kept, *whole[first + 3 :]] if self.kind.left else whole
        return Prefilled(self.logits(placement))

    def embed(self, token_ids_1T: Any) -> Any:
        self.longest = max(self.longest, token_ids_1T.shape[1])
        return Embeds(token_ids_1T[0].tolist())

    def append(self, embeds: Any, placement: Placement) -> Any:
        assert not self.kind.left
        self.write(embeds.tokens, placement)
        return self.logits(placement)

    def step(self, token_ids_1: Any, placement: Placement) -> Any:
        self.write(token_ids_1.tolist(), placement)
        return self.logits(placement)

    def write(self, tokens: list[Any], placement: Placement) -> None:
        begins = (placement.write_index, *placement.stage_write_index)
        for cache, begin in zip(self.caches, begins, strict=True):
            assert int(begin[0]) <= len(cache), "a hole"
            cache[int(begin[0]) :] = zip(tokens, by_token(placement), strict=True)

    def logits(self, placement: Placement) -> Any:
        assert [len(cache) for cache in self.caches] == [int(slot[0]) for slot in placement.slots_of_stages]
        assert all(len(cache) <= most for cache, most in zip(self.caches, self.slots, strict=True))
        where = None
        if self.kind.blocks:
            assert placement.image_slots is not None
            where = placement.image_slots.tolist()
        return np.array([[hash((repr(self.caches), repr(where))) % 2**20]], np.float32)


def by_token(placement: Placement) -> list[Any]:
    ids: list[Any] = placement.position_ids.reshape(-1, placement.position_ids.shape[-1]).T.tolist()
    return ids


def seen_images(number: int, kind: Kind) -> SeenImages:
    """Of one call; the number tells them from others."""
    kept = [[(number * 7 + image + offset) % VISUAL for offset in range(3)] for image in range(kind.images)]
    kept = [sorted(set(each)) for each in kept]
    batch: ImageBatch = of_one_size(np.zeros((kind.images, 3, 1, 1), np.float32), VISUAL)
    if kind.mrope:
        batch = replace(batch, grids=np.array([[1, VISUAL]]))
    tokens = [[("image", number, image, index) for index in each] for image, each in enumerate(kept)]
    visual = VisualTokens(
        embeds=tokens,  # type: ignore[arg-type]
        kept_indices=np.array(kept, np.int64).reshape(1, -1),
        kept_counts=None if kind.images == 1 else np.full((1, kind.images), 3),
    )
    return SeenImages(batch, visual=visual)


class Talk:
    """A conversation that is read by one cache; ids of a turn, its images, an answer."""

    def __init__(self, kind: Kind) -> None:
        self.session = FakeSession(kind)
        self.cache = ConversationCache(self.session, manifest_of(kind))  # type: ignore[arg-type]
        self.ids: list[int] = []
        self.seen: list[SeenImages] = []

    def read(self, ids: Sequence[int], seen: Sequence[SeenImages], answer: Sequence[int]) -> list[Any]:
        """Logits of the prompt and of every token of an answer."""
        whole, images = [*self.ids, *ids], [*self.seen, *seen]
        logits = [self.cache.read(whole, images, len(answer) + 1).copy()]
        for number, id_ in enumerate(answer):
            if self.cache.lost:
                logits.append(self.cache.read([*whole, *answer[: number + 1]], images, 2).copy())
            else:
                logits.append(self.cache.step(id_)[:1].copy())
        return [float(each[0]) for each in logits]

    def said(self, ids: Sequence[int], seen: Sequence[SeenImages], answer: Sequence[int]) -> None:
        self.ids += [*ids, *answer]
        self.seen += seen


@st.composite
def turns(draw: st.DrawFn, kind: Kind, *, images: int) -> tuple[list[int], int, list[int]]:
    """Ids of a question with images in it, and of its answer; the placeholder may be a word in both."""
    words = st.integers(0, 9)
    ids = draw(st.lists(words, min_size=1, max_size=8))
    for _ in range(images):
        spot = draw(st.integers(0, len(ids) - 1))
        between = draw(st.lists(words.filter(lambda id_: id_ != PLACEHOLDER), max_size=1))
        ids[spot:spot] = [IMAGE, *([*between, IMAGE] if kind.images == 2 else [])]
    return ids, images, draw(st.lists(words, max_size=3))


@st.composite
def talks(draw: st.DrawFn, kind: Kind) -> list[tuple[list[int], int, list[int], str]]:
    told, images_left = [], 1 if kind.whole_prompt else 3
    for _ in range(draw(st.integers(1, 5))):
        images = draw(st.integers(0, min(2, images_left)))
        ids, _, answer = draw(turns(kind, images=images))
        if kind.whole_prompt and images and PLACEHOLDER in ids[: ids.index(IMAGE)]:
            ids = [id_ if id_ != PLACEHOLDER else 8 for id_ in ids]
        what = draw(st.sampled_from(["say", "say", "drop", "lose"]))
        images_left -= images if what != "drop" else 0
        told.append((ids, images, answer, what))
    return told


def check_talk(kind: Kind, told: Sequence[tuple[list[int], int, list[int], str]]) -> None:
    talk = Talk(kind)
    plain = Talk(kind)
    for number, (ids, images, answer, what) in enumerate(told):
        if kind.whole_prompt and PLACEHOLDER in plain.ids and images:
            return  # it cannot be spliced with an image behind it, and is refused
        seen = [seen_images(10 * number + image, kind) for image in range(images)]
        if what == "lose":
            talk.session.clear([CAPACITY] * len(talk.session.caches))
            talk.session.caches = [[("other", 0)] * 99 for _ in talk.session.caches]
        got = talk.read(ids, seen, answer)
        if what == "drop":
            continue
        # The same read by a cache that was never lost, and of which nothing was dropped.
        assert got == plain.read(ids, seen, answer)
        assert talk.session.caches == plain.session.caches
        for each in (talk, plain):
            each.said(ids, seen, answer)
    assert talk.session.longest <= LONGEST or kind.whole_prompt or kind.images > 1


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_however_it_was_read_the_same_lies_in_the_cache(name: str, data: st.DataObject) -> None:
    check_talk(KINDS[name], data.draw(talks(KINDS[name])))


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=1000)
@given(data=st.data())
def test_of_many_conversations_too(name: str, data: st.DataObject) -> None:
    check_talk(KINDS[name], data.draw(talks(KINDS[name])))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_the_whole_at_once_is_what_turns_are(name: str, data: st.DataObject) -> None:
    """Where no stage chooses by the first prompt: tokens and their positions, in order, without a word of calls."""
    kind = KINDS[name]
    if kind.whole_prompt:
        return
    told = [each for each in data.draw(talks(kind)) if each[3] != "drop"]
    talk = Talk(kind)
    for number, (ids, images, answer, _) in enumerate(told):
        seen = [seen_images(10 * number + image, kind) for image in range(images)]
        talk.read(ids, seen, answer)
        talk.said(ids, seen, answer)
    (cache,) = talk.session.caches
    expected, position, images_seen = (
        [],
        0,
        iter(tokens for each in talk.seen for tokens in each.visual.embeds),
    )  # type: ignore[union-attr]
    for id_ in talk.ids:
        if id_ == IMAGE:
            for token in next(images_seen):
                place_of = [position, position, position + token[3]] if kind.mrope else [position + token[3]]
                expected.append((token, place_of))
        else:
            expected.append((id_, [position] * (3 if kind.mrope else 1)))
        position += VISUAL if id_ == IMAGE else 1
    assert cache == expected


def test_other_images_in_the_same_places_are_read() -> None:
    for kind in KINDS.values():
        one, other = Talk(kind), Talk(kind)
        ids = [1, 2, *[IMAGE] * kind.images, 3]
        first, second = seen_images(1, kind), seen_images(2, kind)
        assert one.read(ids, [first], [4]) != other.read(ids, [second], [4])
        assert one.read(ids, [second], [4]) == other.read(ids, [second], [4])
        assert one.session.caches == other.session.caches


@pytest.mark.parametrize("name", ["stages", "blocks"])
def test_a_second_image_is_refused_where_the_first_prompt_is_special(name: str) -> None:
    kind = KINDS[name]
    talk = Talk(kind)
    talk.read([1, IMAGE, 2], [seen_images(1, kind)], [3])
    talk.said([1, IMAGE, 2], [seen_images(1, kind)], [3])
    with pytest.raises(InputError, match="an image: stands behind other text or in a later turn"):
        talk.read([4, IMAGE, 5], [seen_images(2, kind)], [])
    talk.cache.forget()
    with pytest.raises(InputError, match="stands behind other text"):
        Talk(kind).read([1, IMAGE, 2, IMAGE, 5], [seen_images(1, kind), seen_images(2, kind)], [])


def test_what_fits_is_counted_in_slots_and_positions() -> None:
    kind = KINDS["plain"]
    manifest = Talk(kind).cache._manifest
    seen = [seen_images(1, kind)]
    check_fits(manifest, [1] * (CAPACITY - 3 - 4) + [IMAGE], seen, 5)
    with pytest.raises(
        InputError,
        match=r"194 text tokens and 3 visual tokens.* 5 new tokens needs 201 slots of a cache of 200",
    ):
        check_fits(manifest, [1] * (CAPACITY - 3 - 3) + [IMAGE], seen, 5)
    manifest.spec.max_positions = 20  # type: ignore[misc]
    check_fits(manifest, [1] * 10 + [IMAGE], seen, 5)
    with pytest.raises(
        InputError, match=r"reaches position 21 with 6 new tokens \(unpruned\), and the model knows 20"
    ):
        check_fits(manifest, [1] * 10 + [IMAGE], seen, 6)


def test_frequencies_that_follow_the_length_are_computed_anew() -> None:
    kind = KINDS["plain"]
    talk = Talk(kind)
    talk.cache._manifest.spec.scaled_beyond = 6  # type: ignore[misc]
    for count, begun in ((3, 1), (2, 1), (3, 2), (1, 3)):
        talk.read([1] * count, [], [])
        talk.said([1] * count, [], [])
        assert talk.session.caches_begun == begun


def test_a_later_stage_may_be_full_before_the_first() -> None:
    """It has slots to spare for the largest image; a small one loses few tokens, and the answer goes on in all stages."""
    manifest = manifest_of(Kind(left=(5,)))
    runs = (CacheRun(layers=1, capacity=100), CacheRun(layers=1, capacity=40))
    manifest.cache_layout, manifest.capacity = CacheLayout(runs, static=False), 100
    batch = ImageBatch(({},), np.array([10]), np.array([10]))
    seen = [SeenImages(batch, KeepCounts((10,), np.array([[[5]]])))]
    check_fits(manifest, [1] * 30 + [IMAGE], seen, 6)
    with pytest.raises(InputError, match="needs 41 slots of a cache of 40"):
        check_fits(manifest, [1] * 31 + [IMAGE], seen, 6)
    check_fits(manifest, [1] * 30, [], 11)
    with pytest.raises(InputError, match="needs 41 slots of a cache of 40"):
        check_fits(manifest, [1] * 31, [], 11)
