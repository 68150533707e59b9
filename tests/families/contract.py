"""What holds for every family in `tiny_families.FAMILIES`, each said once.

A class of tests takes it over for a group of families and adds what is peculiar to them:

    class TestTiles(Contract):
        families = TILES
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from gap_export.evaluation.controls import controls
from gap_export.graph.quantize import DECODERS
from gap_export.runtime.keep import keep_counts
from tests.families.answers import (
    PROMPTS,
    Asked,
    Families,
    assert_equal,
    noise,
    unpruned_prompt,
    whole_model,
)
from tests.families.cuda_kernels import HALVES, documented_operators, without_kernel
from tests.families.reduced import IMAGE_TOKEN
from tests.families.tiny_families import BY_ATTENTION, Inputs, Options, TinyFamily, ranged
from tests.unpruned import gather_ids

ENGINES = {"targets": ("onnx", "tensorrt-rtx"), "compute_capabilities": ("8.6",), "precision": "fp16"}


@dataclass(frozen=True)
class Case:
    """A bundle of a family."""

    family: TinyFamily
    options: Options

    def __str__(self) -> str:
        return "-".join(map(str, [self.family.name, *self.options.values()]))

    def asked(self, tiny_family: Families) -> Asked:
        return tiny_family(self.family.name).asked(**self.options)


class Contract:
    """Tests of a group of families; their arguments are cases: `usual`, `build`, `scored`, `other`, `engine`.

    Attributes:
        families: of the group.
        images: in a prompt.
    """

    families: ClassVar[tuple[TinyFamily, ...]]
    images: ClassVar[int] = 1

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`usual` is the first bundle of every family, `build` every bundle, `scored` those that go by attention, `other` those of
        `more` (of prompts with several images, all), `engine` every bundle with engines; but for the first with one image, engines take
        long, and so do builds of `more`.
        """
        cases: dict[str, list[Case]] = {"usual": [], "build": [], "scored": [], "other": [], "engine": []}
        number = {"images": self.images} if self.images > 1 else {}
        for family in self.families:
            builds = (*family.builds[self.images], *(family.more if self.images == 1 else ()))
            engines = [ranged(pruner) | ENGINES for pruner in family.engines.get(self.images, ())]
            engines += [  # the rule for merged tokens that looks at the grids
                {**options, "merged_id": "centroid"}
                for options in engines
                if options["pruner"] == "prumerge_plus"
            ]
            scored = [options for options in builds if options["pruner"] in BY_ATTENTION]
            for argument, recipes in (
                ("usual", builds[:1]),
                ("build", builds),
                ("scored", scored),
                ("other", family.more if self.images == 1 else builds),
                ("engine", engines),
            ):
                cases[argument] += [Case(family, options | number) for options in recipes]
        for argument in cases.keys() & set(metafunc.fixturenames):
            quick = 1 if self.images == 1 else 0
            long = cases[argument][quick:] if argument == "engine" else []
            values = [
                pytest.param(case, marks=pytest.mark.long, id=str(case))
                if argument == "other" or case in long or case.options in case.family.more
                else case
                for case in cases[argument]
            ]
            metafunc.parametrize(argument, values, ids=str)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_graphs_answer_as_the_reference(self, tiny_family: Families, build: Case, batch: int) -> None:
        asked = build.asked(tiny_family)
        mine = asked.answer(batch)
        assert_equal(mine, asked.true_answer(batch))
        assert mine.kept_counts is not None
        assert (mine.kept_counts.reshape(-1) < asked.batch(batch).visual_tokens).all()
        assert mine.kept_counts.shape == ((batch,) if self.images == 1 else (batch, self.images))

    def test_openvino_answers_as_the_reference(self, tiny_family: Families, usual: Case) -> None:
        """Images that differ in size, prompts that differ in length; what the two rows keep differs too."""
        asked = usual.asked(tiny_family)
        for batch in (2, 1):
            assert_equal(asked.answer_of("openvino", batch), asked.true_answer(batch))

    @pytest.mark.long
    def test_openvino_answers_of_every_build(self, tiny_family: Families, build: Case) -> None:
        asked = build.asked(tiny_family)
        assert_equal(asked.answer_of("openvino", 2), asked.true_answer(2))

    def test_cuda_has_kernels(self, tiny_family: Families, build: Case) -> None:
        """By the list of the pinned release; a tower may do without, its nodes then run on the CPU, and that is said."""
        bundle = build.asked(tiny_family).bundle
        for name, graph in bundle.manifest.graphs.items():
            assert name == "vision" or not without_kernel(bundle.graph_path(name)), name
            assert name not in DECODERS or set(graph.operators) <= documented_operators()

    @pytest.mark.parametrize("half", HALVES)
    def test_cuda_has_kernels_in_half_precision(self, tiny_family: Families, engine: Case, half: str) -> None:
        bundle = engine.asked(tiny_family).bundle
        for name in bundle.manifest.graphs:
            assert name == "vision" or not without_kernel(bundle.graph_path(name), half), name

    @pytest.mark.parametrize("keep", [0.1, 1.0])
    def test_requests_choose_their_share(self, tiny_family: Families, usual: Case, keep: float) -> None:
        asked = usual.asked(tiny_family)
        mine = asked.answer(2, keep)
        assert_equal(mine, asked.true_answer(2, keep))
        batch = asked.batch(2)
        lines = [len(call.get("newline_positions", ())) for call in batch.calls]
        assert (batch.visual_tokens - batch.prunable).tolist() == lines
        assert mine.kept_counts is not None
        kept = mine.kept_counts.reshape(-1) - lines
        assert kept.tolist() == np.floor(keep * batch.prunable + 0.5).tolist()
        assert (mine.kept_indices >= 0).sum() == mine.kept_counts.sum()
        assert len(set(batch.visual_tokens)) > 1, "images must differ, or nothing is tested"

    def test_unpruned_is_the_whole_model(self, tiny_family: Families, usual: Case) -> None:
        """transformers packs tiles, cuts bars, adds ends of lines and deepstack levels, and numbers tokens by itself: nothing of ours
        is in it.
        """
        asked = usual.asked(tiny_family)
        mine, model = asked.answer(2, 1.0), whole_model(asked.folder)
        for row in range(2):
            ids, inputs = whole_prompt(asked, row)
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, -1]
            np.testing.assert_allclose(mine.logits[0][row], logits.numpy(), atol=1e-3)

    def test_ids_are_those_of_the_unpruned_prompt(self, tiny_family: Families, usual: Case) -> None:
        """Number the unpruned prompt, and cross out what was pruned."""
        asked = usual.asked(tiny_family)
        run = asked.answer(2)
        assert run.kept_counts is not None
        for row, counts in enumerate(run.kept_counts.reshape(2, self.images)):
            ids, inputs = whole_prompt(asked, row)
            kept = np.split(run.kept_indices[row][run.kept_indices[row] >= 0], np.cumsum(counts)[:-1])
            visual = np.split(np.flatnonzero(ids[0] == IMAGE_TOKEN), np.cumsum(tokens_of(asked, row))[:-1])
            for kept_K, count in zip(kept, counts, strict=True):
                assert len(kept_K) == count
                assert (np.diff(kept_K) > 0).all()
            images = [tokens[kept_K] for tokens, kept_K in zip(visual, kept, strict=True)]
            surviving = np.sort(np.concatenate([np.flatnonzero(ids[0] != IMAGE_TOKEN), *images]))
            numbered = asked.family.number(whole_model(asked.folder), inputs, ids)
            expected, following = gather_ids(numbered, surviving)
            mine = run.placement.position_ids[..., row, : len(surviving)]
            np.testing.assert_array_equal(mine.reshape(expected.shape), expected)
            assert run.placement.next_position[row] == following
            assert run.placement.next_slot[row] == len(surviving) < ids.shape[1]

    @pytest.mark.parametrize("control", controls())
    def test_wrong_placements_show(self, tiny_family: Families, usual: Case, control: str) -> None:
        assert usual.asked(tiny_family).moved_by(control) > 1e-2

    def test_wrong_placements_show_whatever_prunes(self, tiny_family: Families, other: Case) -> None:
        """In a bundle that renumbers, what renumbers is no other placement, and nothing moves."""
        asked = other.asked(tiny_family)
        same = {"ids shifted", "decoding continues at kept length"} if "positions" in other.options else set()
        moved = {control for control in controls() if asked.moved_by(control) > 1e-2}
        assert moved == set(controls()) - same

    def test_many_images_keep_what_the_reference_keeps(self, tiny_family: Families, scored: Case) -> None:
        """Noise of random sizes. Scores of the reference come from transformers' attention, in float64 from there on."""
        asked, generator = scored.asked(tiny_family), np.random.default_rng(3)
        manifest = asked.bundle.manifest
        verdicts = []
        for width, height in generator.integers(24, 120, (20, 2)):
            batch = manifest.layout.prepare(
                [noise(int(width), int(height))], visual_tokens=manifest.spec.visual_tokens
            )
            (count,) = keep_counts(manifest.pruning, manifest.spec, batch, None).calls
            mine, theirs = (
                session.encode(batch.calls[0], keep_count=count)
                for session in (asked.session, asked.reference)
            )
            assert theirs.margins is not None
            equal = np.array_equal(mine.kept_indices, theirs.kept_indices)
            verdicts.append("equal" if equal else "tie" if theirs.margins[0] < 1e-5 else "different")
        assert set(verdicts) <= {"equal", "tie"}
        assert verdicts.count("tie") <= 4, verdicts

    def test_every_row_of_the_ids_is_read(self, tiny_family: Families, usual: Case) -> None:
        asked = usual.asked(tiny_family)
        rows = asked.answer(1).placement.position_ids[..., 0, 0].size

        for row in range(rows):

            def shift(placement: Any, visual: Any, row: int = row) -> Any:
                ids = placement.position_ids.copy()
                ids.reshape(rows, 1, -1)[row, :, 3:5] += 100  # the last section of M-RoPE turns slowly
                return replace(placement, position_ids=ids)

            assert asked.misled(1, shift) > 1e-2

    def test_engines_are_built(self, tiny_family: Families, engine: Case) -> None:
        pytest.importorskip(
            "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'"
        )
        bundle = engine.asked(tiny_family).bundle
        assert set(bundle.manifest.engines["tensorrt-rtx"]) == {"vision", "splice", "embed", "decoder"}


def tokens_of(asked: Asked, row: int) -> Any:
    """[I] visual tokens of a prompt's images, nothing pruned."""
    return asked.batch(2).visual_tokens.reshape(2, asked.images)[row]


def whole_prompt(asked: Asked, row: int) -> tuple[torch.Tensor, Inputs]:
    """[1, S] ids of a prompt in which nothing is pruned, and what transformers' model takes beside them."""
    ids = unpruned_prompt(PROMPTS[asked.images][row], tokens_of(asked, row))
    calls = asked.batch(2).calls[asked.images * row :][: asked.images]
    return ids, asked.family.inputs(calls, asked.sizes(2)[row], ids)
