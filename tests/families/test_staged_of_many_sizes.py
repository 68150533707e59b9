"""Tokens dropped inside the decoder, of images that differ in size: graphs against transformers' layers run one by one.

Counts follow the image's own number of tokens, every image of a prompt has its own, ids have three rows, and features of DeepStack go where
their tokens go. The decoders are those of the small checkpoints, four layers deep.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gap_export import prune
from gap_export.bundle.manifest import Stage
from gap_export.evaluation.controls import controls
from gap_export.graph.trace_cache import Tracer
from gap_export.precision import precision
from gap_export.runtime.generate import Generation
from tests.families.answers import Asked, Families, Tiny, assert_equal, whole_model
from tests.families.conftest import save_checkpoint
from tests.families.contract import ENGINES, whole_prompt
from tests.families.tiny_families import FAMILIES, TinyFamily, fixed, ranged

pytestmark = pytest.mark.slow

INSIDE = prune.names(in_decoder=True)
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision", "internvl")
LAYERS = 4


@dataclass(frozen=True)
class Case:
    """A bundle of a family."""

    name: str
    pruner: str
    images: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join(map(str, [self.name, self.pruner, self.images, *dict(self.options).values()]))

    def asked(self, deep_family: Families) -> Asked:
        number = {"images": self.images} if self.images > 1 else {}
        return deep_family(self.name).asked(**{**fixed(self.pruner), **number, **dict(self.options)})


def of_two(pruner: str) -> Case:
    """Three rows of ids, features of DeepStack, two images, and requests that choose."""
    return Case("qwen3_vl", pruner, 2, tuple(ranged(pruner).items()))


USUAL = of_two("fastv")
MERGING = of_two("sparsevlm")
OTHERS = (
    *(Case(name, pruner) for name in NAMES for pruner in INSIDE),
    Case("internvl", "sparsevlm", 2),
    Case("llava_onevision", "pyramiddrop", 2),
    Case("qwen2_vl", "fastv", 2, (("positions", "permuted"),)),
    Case("qwen2_5_vl", "pyramiddrop", 2, (("positions", "shifted"),)),
    Case("qwen3_vl", "fastv", 1, (("prune_layers", (1,)),)),
    Case("llava_next", "fastv", 1, (("positions", "permuted"),)),
)
usual = pytest.mark.parametrize("case", [USUAL, pytest.param(MERGING, marks=pytest.mark.long)], ids=str)
every = pytest.mark.parametrize(
    "case", [USUAL, *(pytest.param(case, marks=pytest.mark.long) for case in (MERGING, *OTHERS))], ids=str
)
engines = pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(name, pruner, images, tuple(ENGINES.items())), marks=pytest.mark.long)
        for name, pruner, images in (
            ("qwen3_vl", "sparsevlm", 2),
            ("internvl", "pyramiddrop", 1),
            ("llava_next", "fastv", 1),
        )
    ],
    ids=str,
)


def deeper(family: TinyFamily) -> TinyFamily:
    config = json.loads(json.dumps(dict(family.config)))
    text = config.get("text_config", config)
    text["num_hidden_layers"] = LAYERS
    if "layer_types" in text:
        text["layer_types"] = ["full_attention"] * LAYERS
    return replace(family, config=config)


@pytest.fixture(scope="session")
def deep_family(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tracer: Tracer
) -> Callable[[str], Tiny]:
    """`deep_family(name)`: as `tiny_family`, with more decoder layers."""
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            family, folder = deeper(FAMILIES[name]), tmp_path_factory.mktemp(f"deep-{name}")
            checkpoint = save_checkpoint(folder / "checkpoint", family, tiny_checkpoint / "tokenizer.json")
            made[name] = Tiny(family, checkpoint, folder, tracer)
        return made[name]

    return make


def assert_same(mine: Generation, theirs: Generation) -> None:
    """Choices of every stage, ids, slots, tokens; logits nearly so."""
    assert theirs.margins is not None
    assert theirs.margins.min() > precision("fp32").choice_margin, "no choice here may hang by a hair"
    for ours, reference in zip(mine.every_kept_indices, theirs.every_kept_indices, strict=True):
        np.testing.assert_array_equal(ours, reference)
    for slots, expected in zip(mine.placement.slots_of_stages, theirs.placement.slots_of_stages, strict=True):
        np.testing.assert_array_equal(slots, expected)
    assert_equal(mine, theirs)


@every
@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_answer_as_the_reference(deep_family: Families, case: Case, batch: int) -> None:
    asked = case.asked(deep_family)
    mine = asked.answer(batch)
    assert_same(mine, asked.true_answer(batch))
    tokens = asked.batch(batch).visual_tokens.reshape(batch, case.images)
    counts = mine.placement.stage_counts
    assert counts is not None
    schedule = prune.row(case.pruner).load_schedule()
    share = asked.bundle.manifest.pruning.keep
    assert counts.tolist() == [[list(schedule.counts(share, int(n))) for n in row] for row in tokens]
    assert (counts[:, :, -1] < tokens).all()
    assert batch == 1 or len(set(tokens.reshape(-1))) > 1, "images must differ, or nothing is tested"
    for stage, kept in enumerate(mine.stage_kept_indices):
        for row, total in zip(kept, counts[:, :, stage].sum(axis=1), strict=True):
            assert (row >= 0).sum() == total


@usual
@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_requests_choose_their_share(deep_family: Families, case: Case, keep: float) -> None:
    asked = case.asked(deep_family)
    assert_same(asked.answer(2, keep), asked.true_answer(2, keep))


@usual
def test_unpruned_is_the_whole_model(deep_family: Families, case: Case) -> None:
    """transformers adds features of DeepStack and numbers tokens by itself: nothing of ours is in it."""
    asked = case.asked(deep_family)
    mine, model = asked.answer(2, 1.0), whole_model(asked.folder)
    for row in range(2):
        ids, inputs = whole_prompt(asked, row)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, -1]
        np.testing.assert_allclose(mine.logits[0][row], logits.numpy(), atol=1e-3)


@usual
@pytest.mark.parametrize("control", controls(staged=True))
def test_wrong_placements_show(deep_family: Families, case: Case, control: str) -> None:
    asked = case.asked(deep_family)
    right = asked.answer(2)
    before = right.placement.image_slots
    assert before is not None
    wrong = controls(staged=True)[control]
    assert asked.misled(2, lambda placement, visual: wrong(placement, before[:, 0, 0], _kept(visual))) > 1e-2


def _kept(visual: Any) -> Any:
    return (visual.kept_indices >= 0).sum(axis=1)


@usual
def test_renumbered_survivors_answer_otherwise(deep_family: Families, case: Case) -> None:
    """A bundle whose later stages number what is left by slot: that it does not show would prove nothing of the ids."""
    gap = case.asked(deep_family)
    shifted = gap.reference.shifted_inside()  # type: ignore[attr-defined]
    assert shifted is not None
    other = replace(gap, _answers={})
    vars(other)["reference"] = shifted
    right, wrong = gap.true_answer(2), other.true_answer(2)
    assert max(np.abs(a - b).max() for a, b in zip(right.logits, wrong.logits, strict=True)) > 1e-2


@usual
def test_openvino_answers_as_the_reference(deep_family: Families, case: Case) -> None:
    asked = case.asked(deep_family)
    for batch in (2, 1):
        assert_same(asked.answer_of("openvino", batch), asked.true_answer(batch))


@engines
def test_engines_are_built(deep_family: Families, case: Case) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    bundle = case.asked(deep_family).bundle
    assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "prefill", "decode"}


@usual
def test_the_manifest_tells_what_stages_have(deep_family: Families, case: Case) -> None:
    manifest = case.asked(deep_family).bundle.manifest
    first, *later = manifest.pruning.stages
    assert (first.kept, first.max_kept) == (manifest.pruning.kept, manifest.pruning.max_tokens)
    spare = [stage.capacity - case.images * stage.max_kept for stage in (first, *later)]
    assert min(spare) == spare[0]
    later_stages = {"fastv": 1, "sparsevlm": 3}[case.pruner]
    assert [stage.max_kept for stage in later] == [first.max_kept] * later_stages, "requests may keep all"
    assert isinstance(later[0], Stage)
    assert later[-1].kept < first.kept
