"""What conversations should be, from elsewhere: ids by transformers' tokenizers, answers by its `generate` on the whole conversation, positions
counted one by one from the table in `positions.py`.

Nothing of `gap_export.inputs.chat` is used, and of its caches nothing either.

Shape letters: S tokens, R rows of position ids, K kept tokens of an image, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gap_export.positions import Ids, Placement
from gap_export.runtime.conversation.cache import SeenImages
from gap_export.runtime.torch.session import as_loaded
from tests.families.answers import whole_model
from tests.families.reduced import BOS, IMAGE_TOKEN
from tests.families.spoken import Speech
from tests.families.talks import Question, Talk
from tests.families.tiny_families import TinyFamily

IMAGE = -2
"""Stands for an image among ids."""

CLOSE = 1e-4
"""Of logits, as a share of their spread; two that are nearer in the reference may change places."""


# Ids


def whole_ids(
    folder: Path,
    speech: Speech,
    questions: Sequence[Question],
    answers: Sequence[Sequence[int]],
    image_token: int = IMAGE_TOKEN,
) -> list[int]:
    """Ids of a conversation up to the last question, `IMAGE` for every image, answers in the ids that they were given in.

    Args:
        folder: of a tokenizer.json.
        speech: how the checkpoint is spoken to.
        questions: of the user.
        answers: to all of them but the last.
        image_token: id of the placeholder.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        parts = [{"type": "image"}] * len(question.images)
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        said = [{"type": "text", "text": f"ANSWER{number}ENDS"}]
        messages += [{"role": "assistant", "content": said}] if number + 1 < len(questions) else []
    text = tokenizer.apply_chat_template(
        messages, chat_template=speech.jinja, tokenize=False, add_generation_prompt=True
    )
    if speech.image not in text:
        text = text.replace(speech.placeholder, speech.image)
    ids: list[int] = [BOS] if speech.begins else []
    for number, piece in enumerate(re.split(r"ANSWER\d+ENDS", text)):
        ids += list(answers[number - 1]) if number else []
        own = tokenizer(piece, add_special_tokens=False).input_ids
        ids += [IMAGE if id_ == image_token else id_ for id_ in own]
    return ids


# Answers of transformers


def assert_as_transformers(
    talk: Talk, folder: Path, family: TinyFamily, speech: Speech, new_tokens: int
) -> bool:
    """Nothing is pruned: every answer is that of `generate` on the whole conversation.

    Returns:
        Whether an answer differed where two logits of transformers are as good as equal.
    """
    differed = False
    model = whole_model(folder)
    for turn, mine in enumerate(talk.answers):
        questions = talk.questions[: turn + 1]
        ids = whole_ids(folder, speech, questions, talk.answers[:turn])
        read = (*ids, *mine[:-1]) if turn + 1 == len(talk.answers) else ids
        assert list(talk.ids[: len(read)]) == list(read)
        images = [image for question in questions for image in question.images]
        expanded, inputs = whole_inputs(family, ids, seen_first(talk.seen, len(images)), images)
        theirs, logits_nV = generated(model, expanded, inputs, new_tokens)
        differed |= assert_same_answer(mine, talk.logits[turn], theirs, logits_nV)
    return differed


def assert_same_answer(
    mine: Sequence[int], mine_nV: NDArray[np.float32], theirs: Sequence[int], theirs_nV: NDArray[np.float32]
) -> bool:
    """Tokens are the same, and logits nearly so, up to where two of theirs are as good as equal.

    Returns:
        Whether there is such a place.
    """
    length = next((n for n, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
    assert_near(mine_nV[:length], theirs_nV[:length])
    if length is None:
        return False
    apart = theirs_nV[length][theirs[length]] - theirs_nV[length][mine[length]]
    assert apart <= CLOSE, f"token {length}: {mine[length]} and not {theirs[length]}, {apart} apart"
    return True


def assert_near(mine: NDArray[Any], theirs: NDArray[Any]) -> None:
    """Numbers are the same but for rounding."""
    if theirs.size:
        np.testing.assert_allclose(mine, theirs, atol=CLOSE * float(theirs.max() - theirs.min()))


def seen_first(seen: Sequence[SeenImages], images: int) -> list[SeenImages]:
    """The calls of the first so many images."""
    first = []
    for each in seen:
        if images <= 0:
            break
        first.append(each)
        images -= len(each.batch.visual_tokens)
    return first


def with_tokens_of_images(ids: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Ids with as many placeholders for every image as transformers takes."""
    left = iter(counts)
    return [each for id_ in ids for each in ([IMAGE_TOKEN] * next(left) if id_ == IMAGE else [id_])]


def whole_inputs(
    family: TinyFamily, ids: Sequence[int], seen: Sequence[SeenImages], images: Sequence[Image.Image]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What transformers takes: [1, S] ids, and the images as our preprocessing gives them."""
    counts = [int(count) for each in seen for count in each.batch.visual_tokens]
    expanded = torch.tensor([with_tokens_of_images(ids, counts)])
    calls = [call for each in seen for call in each.batch.calls]
    sizes = [image.size for image in images]
    return expanded, family.inputs(calls, sizes, expanded) if images else {}


@torch.inference_mode()
def generated(
    model: Any, ids_1S: torch.Tensor, inputs: dict[str, torch.Tensor], new_tokens: int
) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy: (ids, [n, V] logits)."""
    model.generation_config.eos_token_id = None
    as_loaded(getattr(model.model, "language_model", None))  # or it keeps the frequencies of a longer request
    out = model.generate(
        input_ids=ids_1S,
        attention_mask=torch.ones_like(ids_1S),
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids_1S.shape[1] :].tolist(), torch.cat(out.logits).float().numpy()


# Positions


@dataclass(frozen=True)
class Shown:
    """One image of a conversation.

    Attributes:
        kept_K: raster indices of what entered the decoder.
        visual: N.
        grid: (rows, columns) of those, where positions follow the grid.
    """

    kept_K: list[int]
    visual: int
    grid: tuple[int, int] | None


def shown_images(seen: Sequence[SeenImages]) -> list[Shown]:
    """All images of a conversation."""
    shown = []
    for each in seen:
        assert each.visual is not None
        kept, counts = each.visual.kept_indices[0], each.visual.kept_counts
        own = kept[kept >= 0]
        borders = [] if counts is None or counts.ndim == 1 else np.cumsum(counts[0])[:-1].tolist()
        for number, kept_K in enumerate(np.split(own, borders)):
            grid = None if each.batch.grids is None else tuple(each.batch.grids[number].tolist())
            shown.append(Shown(kept_K.tolist(), int(each.batch.visual_tokens[number]), grid))
    return shown


@dataclass(frozen=True)
class Places:
    """Where the tokens of a conversation belong.

    Attributes:
        columns: of every slot of the first stage, its position ids.
        marks: (position, slots of all stages) before every token, an image being one, and after the last.
    """

    columns: list[tuple[int, ...]]
    marks: list[tuple[int, tuple[int, ...]]]


def places_of(
    ids: Sequence[int], images: Sequence[Shown], *, rows: int, gap: bool, dropped: Sequence[int] = (0,)
) -> Places:
    """The table of `positions.py`, token by token.

    Args:
        ids: of the conversation.
        images: of it.
        rows: of position ids.
        gap: whether every token keeps the id it had before pruning.
        dropped: of every stage of the decoder, how many tokens of the image it does not see.
    """
    left, position = iter(images), 0
    columns: list[tuple[int, ...]] = []
    marks, gone = [(0, (0,) * len(dropped))], [0] * len(dropped)
    for id_ in ids:
        if id_ != IMAGE:
            columns.append((position,) * rows)
            position += 1
        else:
            image, gone = next(left), list(dropped)
            for place, index in enumerate(image.kept_K):
                if not gap:
                    columns.append((position + place,) * rows)
                elif image.grid is None:
                    columns.append((position + index,) * rows)
                else:
                    row, column = divmod(index, image.grid[1])
                    columns.append((position, position + row, position + column))
            if not gap:
                position += len(image.kept_K)
            else:
                position += image.visual if image.grid is None else max(image.grid)
        marks.append((position, tuple(len(columns) - less for less in gone)))
    return Places(columns, marks)


def assert_places(talk: Talk, *, rows: int, gap: bool = True, dropped: Sequence[int] = (0,)) -> None:
    """Every token was put where it belongs, and the counters of the conversation are those of the table."""
    expected = places_of(talk.ids, shown_images(talk.seen), rows=rows, gap=gap, dropped=dropped)
    assert talk.watched.fed == dict(enumerate(expected.columns))
    slots_of = dict((slots[0], slots) for _, slots in expected.marks)
    for first, slots in talk.watched.fed_alone.items():
        assert slots == slots_of[first]
    context = talk.chat._cache.context
    assert [(mark.position, mark.slots) for mark in context.marks] == expected.marks


# What lies in the cache


def assert_cache_is_one_prompt(
    talk: Talk, session: Any, *, rows: int, gap: bool = True, blocks: bool = False
) -> None:
    """After a conversation the cache of ONNX Runtime is what one call with all of it leaves there."""
    length = len(talk.watched.fed)
    mine = {name: array[:, :, :length].copy() for name, array in session._cache.views().items()}
    pieces, left = [], iter(talk.seen)
    per_call = len(talk.seen[0].batch.visual_tokens) if talk.seen else 1
    ids, number = list(talk.ids), 0
    expected = places_of(ids, shown_images(talk.seen), rows=rows, gap=gap)
    runs = re.finditer(r"i|t+", "".join("i" if id_ == IMAGE else "t" for id_ in ids))
    whole: list[NDArray[np.float32]] = []
    for run in runs:
        if run[0] != "i":
            text = np.array([ids[run.start() : run.end()]], np.int64)
            pieces.append(session.embed(text).numpy())
            continue
        if number % per_call == 0:
            each = next(left)
            assert each.visual is not None
            embeds = each.visual.embeds
            embeds = embeds if isinstance(embeds, np.ndarray) else embeds.numpy()
            counts = each.visual.kept_counts
            borders = [] if counts is None or counts.ndim == 1 else np.cumsum(counts[0])[:-1].tolist()
            kept = int((each.visual.kept_indices[0] >= 0).sum())
            whole = np.split(embeds[:, :kept], borders, axis=1)
        pieces.append(whole[number % per_call])
        number += 1
    embeds_1SH = np.concatenate(pieces, axis=1)
    assert embeds_1SH.shape[1] == length
    ends = zip(ids, expected.marks, expected.marks[1:], strict=False)
    image_slots = [(before[1][0], after[1][0]) for id_, before, after in ends if id_ == IMAGE]
    ids_RS = np.array(expected.columns, np.int64).T
    placement = Placement(
        position_ids=ids_RS if rows == 1 else ids_RS[:, None],
        write_index=_of_one(0),
        last_index=_of_one(length - 1),
        next_position=_of_one(expected.marks[-1][0]),
        next_slot=_of_one(length),
        image_slots=np.array([image_slots or [(0, 0)]], np.int64) if blocks else None,
    )
    session.prefill(embeds_1SH, placement, reserve=1)
    for name, array in session._cache.views().items():
        assert np.abs(mine[name]).max() > 0.1
        np.testing.assert_allclose(mine[name], array[:, :, :length], atol=1e-4, err_msg=name)


def _of_one(number: int) -> Ids:
    return np.array([number], np.int64)


# The reference in torch


def assert_as_reference(mine: Talk, theirs: Talk) -> bool:
    """`theirs` was made to say what `mine` says: kept tokens are the same, logits nearly so, and the likeliest token is the one that was said.

    Returns:
        Whether a token differed where two logits of the reference are as good as equal.
    """
    assert mine.ids == theirs.ids
    assert shown_images(mine.seen) == shown_images(theirs.seen)
    assert mine.chat._cache.context.marks == theirs.chat._cache.context.marks
    differed = False
    for said, mine_nV, theirs_nV in zip(mine.answers, mine.logits, theirs.logits, strict=True):
        assert_near(mine_nV, theirs_nV)
        differed |= assert_likeliest(said, theirs_nV)
    return differed


def assert_likeliest(said: Sequence[int], logits_nV: NDArray[np.float32]) -> bool:
    """What was said is the likeliest token, or as good as.

    Returns:
        Whether another was as good.
    """
    others = 0
    for id_, logits_V in zip(said, logits_nV, strict=True):
        assert logits_V.max() - logits_V[id_] <= CLOSE
        others += logits_V.argmax() != id_
    return others > 0
