"""Conversations with models in the layouts of their authors, held against plain torch: the whole conversation at once, without a cache, every answer
of it token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gap_export.bundle.folder import Bundle
from gap_export.runtime.backends import open_session
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.grounder import Grounder
from tests.families.answers import noise
from tests.families.plain_models import Llama
from tests.families.spoken import Speech, endless
from tests.families.talk_truth import (
    IMAGE,
    assert_cache_is_one_prompt,
    assert_likeliest,
    assert_near,
    assert_places,
    places_of,
    shown_images,
    whole_ids,
)
from tests.families.talks import Mislead, Question, Talk, talk

WIDE, TALL = noise(50, 31), noise(33, 40)
TEXTS = ("where is the red mug ?", "is a cat on the left ?", "a large circle is where ?")
SCRIPTS: dict[str, tuple[tuple[Image.Image, ...], ...]] = {
    "one image": ((WIDE,), (), ()),
    "another image later": ((WIDE,), (), (TALL,)),
    "two images": ((WIDE, TALL), (), ()),
    "text first": ((), (TALL,), ()),
    "text": ((), (), ()),
}
"""Name -> images of every turn."""

Features = Callable[[Any], Tensor]
"""[3, height, width] pixels of an image -> [N, H] tokens, before pruning."""


def every_logits(decoder: Llama, embeds_SH: Tensor, position_ids: list[int]) -> Tensor:
    """[S, V] of every token."""
    x = embeds_SH
    for number in range(decoder.layers):
        normed = decoder._norm(x, f"layers.{number}.input_layernorm")
        x = x + decoder._attention(number, normed, position_ids)
        x = x + decoder._mlp(number, decoder._norm(x, f"layers.{number}.post_attention_layernorm"))
    return decoder._norm(x, "norm") @ decoder.weights["lm_head.weight"].T


def assert_talks_as_plain_torch(
    bundle: Bundle,
    speech: Speech,
    decoder: Llama,
    features: Features,
    which: str,
    new_tokens: int,
    *,
    keep: float | None = None,
    mislead: Mislead | None = None,
    blocks: bool = False,
) -> bool:
    """Three turns, positions and the cache at the end of them.

    Args:
        bundle: as built.
        speech: how its checkpoint is spoken to.
        decoder: in plain torch.
        features: of images, in plain torch.
        which: key of `SCRIPTS`.
        new_tokens: of every answer.
        keep: share of the tokens.
        mislead: changes where tokens are put.
        blocks: whether tokens of an image see each other.

    Returns:
        Whether an answer differed where two logits are as good as equal.
    """
    known = bundle.manifest.model_copy(
        update={"spec": bundle.manifest.spec.model_copy(update={"max_positions": 4096})}
    )
    bundle = endless(Bundle(bundle.folder, known), capacity=1024)
    prompts = ChatPrompts(bundle, Grounder(bundle))
    session = open_session(bundle, "onnxruntime", threads=1)
    questions = [Question(text, images) for text, images in zip(TEXTS, SCRIPTS[which], strict=True)]
    try:
        made = talk(prompts, session, questions, new_tokens, keep=keep, mislead=mislead)
    finally:
        prompts.close()
    differed = False
    for turn, said in enumerate(made.answers):
        token = bundle.manifest.prompt.image_token_id
        ids = whole_ids(bundle.folder, speech, questions[: turn + 1], made.answers[:turn], token)
        ids = [*ids, *said[:-1]]
        assert made.ids[: len(ids)] == tuple(ids)
        theirs_nV = plain_logits(decoder, features, made, ids, blocks=blocks)[-new_tokens:]
        assert_near(made.logits[turn], theirs_nV)
        differed |= assert_likeliest(said, theirs_nV)
    assert_places(made, rows=1)
    assert_cache_is_one_prompt(made, session, rows=1, blocks=blocks)
    session.close()
    return differed


@torch.inference_mode()
def plain_logits(
    decoder: Llama, features: Features, made: Talk, ids: Sequence[int], *, blocks: bool
) -> NDArray[np.float32]:
    """[S, V] of a conversation in which images keep what they kept in the graphs."""
    images = shown_images(made.seen)
    pixels = [image for each in made.seen for call in each.batch.calls for image in call["pixel_values"]]
    places = places_of(ids, images[: list(ids).count(IMAGE)], rows=1, gap=True)
    left = iter(zip(images, pixels, strict=True))
    pieces = []
    for id_ in ids:
        if id_ == IMAGE:
            image, shown = next(left)
            pieces.append(features(torch.from_numpy(shown))[image.kept_K])
        else:
            pieces.append(decoder.embed([id_]))
    if blocks:
        ends = zip(ids, places.marks, places.marks[1:], strict=False)
        runs = tuple((before[1][0], after[1][0]) for id_, before, after in ends if id_ == IMAGE)
        decoder = replace(decoder, blocks=runs)
    logits: NDArray[np.float32] = every_logits(
        decoder, torch.cat(pieces), [place for (place,) in places.columns]
    ).numpy()
    return logits
