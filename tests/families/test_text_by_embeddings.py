"""Pruners that look at the expression where no text tower shares a space with the vision tower: by the decoder's own token embedding."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError, CheckpointError, InputError, SessionWarning
from gap_export.families.reference import open_model as open_reference_model
from gap_export.inputs.prompt import encode_text
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.positions import PAD, Ids
from gap_export.runtime.backends import open_session
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.torch.reference import open_torch
from gap_export.runtime.torch.staged import open_reference
from gap_export.runtime.torch.text_reference import EmbeddingReference
from tests.bundle.test_check import SAMPLE, read, replaced, sweep
from tests.families.answers import Asked, Families, answer, assert_equal, noise

pytestmark = pytest.mark.slow

PRUNERS = ("text_similarity", "trim", "cdpruner")
QUICK = ("qwen2_vl", "trim")
CASES = [
    pytest.param(name, pruner, marks=[] if (name, pruner) == QUICK else pytest.mark.long)
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
    for pruner in PRUNERS
]
WORDS = ["the red mug", "a cat", "square"]


def ids_of(bundle: Bundle, expressions: list[str]) -> Ids:
    tower = bundle.manifest.text_tower
    assert tower is not None
    return encode_text(load_tokenizer(bundle.text_tokenizer_path), tower, expressions)


def asked_of(tiny_family: Families, name: str, pruner: str, **changes: Any) -> Asked:
    return tiny_family(name).asked(pruner=pruner, keep="0.1:0.3:1.0", **changes)


@pytest.mark.parametrize(("name", "pruner"), CASES)
def test_graphs_answer_as_the_reference(name: str, pruner: str, tiny_family: Families) -> None:
    asked = asked_of(tiny_family, name, pruner)
    bundle = asked.bundle
    assert not (bundle.folder / "text_tokenizer.json").exists()
    reference = open_reference(name, asked.folder, bundle.manifest.pruning, text_tower=EmbeddingReference())
    ids = ids_of(bundle, WORDS[:2])
    assert (ids == PAD).any(), "one of them is shorter"
    for keep in (None, 0.15):
        mine, theirs = (
            answer(session, bundle, asked.batch(2), keep, text_ids_BL=ids)
            for session in (asked.session, reference)
        )
        assert_equal(mine, theirs)
    other = answer(asked.session, bundle, asked.batch(2), text_ids_BL=ids_of(bundle, WORDS[1:]))
    first = answer(asked.session, bundle, asked.batch(2), text_ids_BL=ids)
    assert not np.array_equal(first.kept_indices, other.kept_indices), "it is read"
    alone = answer(asked.session, bundle, asked.batch(1), text_ids_BL=ids_of(bundle, WORDS[:1]))
    assert_equal(alone, answer(reference, bundle, asked.batch(1), text_ids_BL=ids_of(bundle, WORDS[:1])))


@pytest.mark.long
@pytest.mark.parametrize(("name", "pruner"), CASES)
def test_openvino_reads_the_expression(name: str, pruner: str, tiny_family: Families) -> None:
    asked = asked_of(tiny_family, name, pruner)
    ids = ids_of(asked.bundle, WORDS[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SessionWarning)  # of a loop that it leaves to ONNX Runtime
        session = open_session(asked.bundle, "openvino", threads=1)
    with session:
        for keep in (None, 0.15):
            mine, theirs = (
                answer(each, asked.bundle, asked.batch(2), keep, text_ids_BL=ids)
                for each in (session, asked.session)
            )
            assert_equal(mine, theirs)


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_the_relevance_is_a_cosine_with_the_mean_embedding(name: str, tiny_family: Families) -> None:
    """Derived from the stored table and the tokens that the whole model projects."""
    asked = asked_of(tiny_family, name, "text_similarity")
    bundle, table = asked.bundle, embeddings_of(asked.folder)
    model = open_reference_model(name, asked.folder, {})
    for number, (width, height) in enumerate([(40, 60), (90, 50), (64, 64)]):
        batch = bundle.manifest.layout.prepare(
            [noise(width, height)], visual_tokens=bundle.manifest.spec.visual_tokens
        )
        (count,) = keep_counts(bundle.manifest.pruning, bundle.manifest.spec, batch, 0.3).calls
        ids = ids_of(bundle, [WORDS[number]])
        kept = asked.session.encode(batch.calls[0], text_ids_BL=ids, keep_count=count).kept_indices[0]
        (image,) = model.extract_features(batch.calls[0])
        assert image.shown.projected is not None
        tokens = image.shown.projected.detach().numpy().astype(np.float64)
        mean = table[ids[0]].astype(np.float64).mean(axis=0)
        cosine = tokens @ mean / np.linalg.norm(tokens, axis=1) / np.linalg.norm(mean)
        assert set(kept.tolist()) == set(np.argsort(-cosine)[:count].tolist())


def embeddings_of(folder: Path) -> NDArray[np.float32]:
    """[V, H], whatever the checkpoint calls it."""
    for file in folder.glob("*.safetensors"):
        stored = load_file(file)
        for name, array in stored.items():
            if name.endswith("embed_tokens.weight"):
                return array
    raise AssertionError("no table")


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "internvl"])
def test_tensorrt_builds_the_vision_graph_in_half_precision(
    name: str, tiny_family: Families, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    from gap_export.engine.build import engine_from_graph

    bundle = asked_of(tiny_family, name, "cdpruner", precision="fp16").bundle
    vision = bundle.manifest.graphs["vision"].spec
    assert "text_ids" in [tensor.name for tensor in vision.inputs]
    engine = engine_from_graph(
        bundle.graph_path("vision"),
        vision,
        target="tensorrt-rtx",
        compute_capabilities=("8.6",),
        folder=tmp_path,
    )
    assert (tmp_path / engine.file).stat().st_size > 0


CLIP = {"text_tower__checkpoint": "clip", "recipe__text_tower": "clip"}


@pytest.mark.parametrize(
    ("field", "value", "also", "words"),
    [
        ("text_tower.kind", "clip", {}, "text_tower.kind is clip, and text_tower.checkpoint is None"),
        ("text_tower.checkpoint", "x", {}, "text_tower.kind is embeddings, and text_tower.checkpoint is 'x'"),
        ("text_tower.checkpoint", "x", {"recipe__text_tower": "x"}, "text_tower.kind is embeddings"),
        ("recipe.text_tower", "x", {}, "text_tower.checkpoint is None, and the recipe says 'x'"),
        ("text_tower.context", 25, {}, "text_tower.context is 25, and that of the decoder's embeddings is 24"),
        ("text_tower.context", 0, {}, "text_tower.context"),
        ("text_tower.width", 33, {}, "text_tower.width is 33, and that of the decoder's embeddings is"),
        ("text_tower.vocabulary", 10**12, {}, "text_tower.vocabulary is 1000000000000, and is from 1 to"),
        ("text_tower.vocabulary", 65, {}, "text_tower.vocabulary is 65, and that of the decoder's embeddings"),
        ("text_tower.aligned_inversely", True, {}, "text_tower.aligned_inversely is True"),
        ("text_tower", None, {}, "graphs.vision.spec.inputs"),
        ("text_tower.kind", "clip", CLIP, "text_tokenizer.json"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_otherwise_is_refused(
    field: str, value: Any, also: dict[str, Any], words: str, tiny_family: Families
) -> None:
    error = read(replaced(asked_of(tiny_family, "qwen2_vl", "trim").bundle, field, value, **also))
    assert error is not None
    assert words in error.message
    assert str(error).isprintable()


def test_manifests_with_one_thing_wrong(tiny_family: Families) -> None:
    sweep(asked_of(tiny_family, "qwen2_vl", "trim").bundle, SAMPLE)


def test_a_kind_that_its_family_has_not_is_refused(tiny_family: Families) -> None:
    """What a manifest alone cannot tell is told where the checkpoint is opened."""
    asked = asked_of(tiny_family, "qwen2_vl", "trim")
    told = asked.bundle.manifest
    assert told.text_tower is not None
    tower = told.text_tower.model_copy(update={"kind": "clip", "checkpoint": "clip"})
    for changes in ({"family": "llava"}, {"text_tower": tower}):
        bundle = Bundle(asked.bundle.folder, told.model_copy(update=changes))
        with pytest.raises(BundleError, match=r"reads the expression by \w+, and models of family") as caught:
            open_torch(bundle, checkpoint=asked.folder)
        assert "\n" not in str(caught.value.message)
    with open_torch(asked.bundle, checkpoint=asked.folder) as session:
        assert session is not None  # the control


def test_bad_input_is_one_line(tiny_family: Families, tiny_text_tower: Path) -> None:
    asked = asked_of(tiny_family, "qwen2_vl", "trim")
    with pytest.raises(InputError, match=r"has \d+ tokens, and the pruner reads 24"):
        ids_of(asked.bundle, ["red mug " * 20])
    with pytest.raises(InputError, match="is empty"):
        ids_of(asked.bundle, ["   "])
    (count,) = keep_counts(
        asked.bundle.manifest.pruning, asked.bundle.manifest.spec, asked.batch(1), None
    ).calls
    with pytest.raises(InputError, match="looks at the expression, and no text ids were given"):
        asked.session.encode(asked.batch(1).calls[0], keep_count=count)
    with pytest.raises(CheckpointError, match="shares no space with the vision tower"):
        asked_of(tiny_family, "qwen2_vl", "trim", text_tower=str(tiny_text_tower))
