"""A bundle of a small checkpoint that can be spoken to, and what is asserted of every conversation with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gap_export.bundle.manifest import Manifest
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.session import Session
from gap_export.runtime.torch.staged import open_reference
from gap_export.runtime.torch.text_reference import TextReference
from tests.families.answers import Asked, noise
from tests.families.spoken import SpokenFamily, endless
from tests.families.talk_truth import (
    assert_as_reference,
    assert_as_transformers,
    assert_cache_is_one_prompt,
    assert_places,
)
from tests.families.talks import Question, Talk, talk

SHORT, LONG, CAPACITY = 24, 200, 1024
"""Tokens of an answer, and slots of a cache."""

WIDE, TALL, SMALL = noise(100, 70), noise(30, 90), noise(40, 30)
SQUARES = noise(30, 34), noise(34, 30)
"""Nearly: of few tokens in every family, and no tile is the whole image again, whose tokens would be chosen at random."""
TEXTS = ("where is the red mug ?", "is a cat on the left ?", "what is above the large circle and where ?")
SCRIPTS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "one image": ((SMALL,), (), ()),
    "another image later": ((WIDE,), (), (TALL,)),
    "two images": ((SMALL, TALL), (), ()),
    "two, and two later": ((SMALL, TALL), (), (WIDE, SMALL)),
    "text": ((), (), ()),
    "text first": ((), (TALL,), ()),
    "squares": ((SQUARES[0],), (), (SQUARES[1],)),
}
"""Name -> images of every turn."""


def script(name: str) -> list[Question]:
    """The questions of a conversation, by its name."""
    return [Question(text, images) for text, images in zip(TEXTS, SCRIPTS[name], strict=True)]


@dataclass(frozen=True)
class Spoke:
    """A bundle, and who answers from it.

    Attributes:
        spoken: its checkpoint.
        asked: the bundle.
        prompts: of it.
        compared: of every conversation that was: its name where two logits were as good as equal, or "".
        text_tower: of pruners that read text.
    """

    spoken: SpokenFamily
    asked: Asked
    prompts: ChatPrompts
    compared: list[str]
    text_tower: Path | None = None

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self.asked.bundle.manifest

    @property
    def rows(self) -> int:
        """Of position ids."""
        return self.manifest.spec.position_rows

    @property
    def gap(self) -> bool:
        """Whether tokens keep the ids they had before pruning."""
        return self.manifest.pruning.positions == "gap"

    @property
    def dropped(self) -> list[int]:
        """Of every stage of the decoder, tokens of the image that it does not see."""
        return [self.manifest.pruning.kept - stage.kept for stage in self.manifest.pruning.stages] or [0]

    @property
    def by_length(self) -> bool:
        """Whether frequencies follow the length: keys in the cache are then of several lengths."""
        return self.manifest.spec.scaled_beyond is not None

    @cached_property
    def reference(self) -> Session:
        """Of the checkpoint."""
        facts, tower = self.manifest.text_tower, None
        if facts is not None:
            assert self.text_tower is not None
            tower = TextReference(self.text_tower, facts)
        manifest = self.manifest
        return open_reference(manifest.family, self.asked.folder, manifest.pruning, text_tower=tower)

    def talk(self, questions: str | list[Question], new_tokens: int, **options: Any) -> Talk:
        """A conversation with the bundle; options as of `talks.talk`."""
        asked = script(questions) if isinstance(questions, str) else questions
        return talk(self.prompts, self.asked.session, asked, new_tokens, **options)

    def reference_talk(self, mine: Talk, new_tokens: int, **options: Any) -> Talk:
        """The same conversation with the reference, which is made to say the same."""
        return talk(self.prompts, self.reference, mine.questions, new_tokens, forced=mine.answers, **options)

    def assert_whole(self, questions: str | list[Question], new_tokens: int, **options: Any) -> Talk:
        """Nothing is pruned: as transformers has it."""
        mine = self.talk(questions, new_tokens, **options)
        self.assert_as_transformers(mine, new_tokens)
        assert_places(mine, rows=self.rows, dropped=self.dropped)
        self._assert_cache(mine)
        return mine

    def assert_as_transformers(self, mine: Talk, new_tokens: int) -> None:
        """A conversation in which nothing is pruned."""
        tiny = self.spoken.tiny
        differed = assert_as_transformers(mine, tiny.checkpoint, tiny.family, self.spoken.speech, new_tokens)
        self._count(mine, differed)

    def assert_pruned(self, questions: str | list[Question], new_tokens: int, **options: Any) -> Talk:
        """As the reference has it."""
        mine = self.talk(questions, new_tokens, **options)
        self._count(mine, assert_as_reference(mine, self.reference_talk(mine, new_tokens, **options)))
        assert_places(mine, rows=self.rows, gap=self.gap, dropped=self.dropped)
        self._assert_cache(mine)
        return mine

    def _assert_cache(self, mine: Talk) -> None:
        if not self.by_length and len(self.dropped) == 1:
            assert_cache_is_one_prompt(mine, self.asked.session, rows=self.rows, gap=self.gap)

    def _count(self, mine: Talk, differed: bool) -> None:
        sizes = [image.size for question in mine.questions for image in question.images]
        name = f"{self.spoken.tiny.family.name}, {self.manifest.pruning.pruner}, images {sizes}"
        self.compared.append(name if differed else "")


Open = Callable[..., Spoke]


def opened(family: SpokenFamily, compared: list[str], *, as_built: bool = False, **recipe: Any) -> Spoke:
    """A bundle of a checkpoint, built if it was not yet, whose answers nothing ends.

    Args:
        family: the checkpoint.
        compared: list of conversations.
        as_built: whether its cache has the slots that it was built with.
        recipe: fields of it.
    """
    asked = family.tiny.asked(**{**family.options(recipe.get("images", 1)), **recipe})
    bundle = endless(asked.bundle, None if as_built else CAPACITY)
    tower = recipe.get("text_tower")
    prompts = ChatPrompts(bundle, Grounder(bundle))
    return Spoke(family, replace(asked, bundle=bundle), prompts, compared, tower and Path(tower))
