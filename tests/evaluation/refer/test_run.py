"""Evaluations from images to records: shared prompts answer as whole ones do, nothing is lost, counted twice or scored in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.evaluator import Evaluator
from gap_export.evaluation.refer.image_source import Folder, InMemory
from gap_export.evaluation.refer.journal import Settings, open_journal
from gap_export.evaluation.refer.predictions import read_predictions
from gap_export.evaluation.refer.protocols import protocol_of
from gap_export.evaluation.refer.results import write_results
from gap_export.evaluation.refer.run import Work, answer_all, record_of, score_all, work_of
from gap_export.runtime.backends import open_session
from tests.recorded import Recorded

SETTINGS = Settings(
    manifest_sha256="b", annotations="a", split="val", backend="onnxruntime", keep=None, share=True
)
TEXTS = ["the red mug", "cat", "the blue cat on the left", "mug below the cat", "the green circle", "dog"]


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    samples = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(samples)


@pytest.fixture(scope="module")
def expressions() -> list[Expression]:
    """Six about each of three images, which are not one after the other."""
    return [
        Expression(f"{text}/{image}", f"{image}.png", text, (1.0, 2.0, 20.0, 25.0), 40, 30)
        for text in TEXTS
        for image in range(3)
    ]


@pytest.fixture(scope="module")
def source() -> InMemory:
    return InMemory({f"{image}.png": noise(image) for image in range(3)})


def answered(evaluator: Evaluator, work: Work, source: Any, folder: Path) -> dict[str, tuple[str, int, int]]:
    journal = open_journal(folder, SETTINGS)
    answer_all(lambda: evaluator, work, source, journal)
    assert len(journal.rows) == len(journal.known) == len(work.expressions)
    return {row.id: (row.answer, row.tokens, row.kept_indices) for row in journal.rows}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pruner": "divprune", "keep": "0.1:0.3:1.0"},
        {"pruner": "text_similarity"},
        {"positions": "permuted"},
    ],
    ids=str,
)
def test_shared_prompts_answer_as_whole_ones(
    tiny_bundle: Callable[..., Bundle], options: Any, expressions: Any, source: Any, tmp_path: Path
) -> None:
    bundle = tiny_bundle(**options)
    session, work = open_session(bundle, "onnxruntime", threads=1), work_of(expressions, source)
    shared = answered(Evaluator(bundle, session), work, source, tmp_path / "shared")
    whole = answered(Evaluator(bundle, session, share=False), work, source, tmp_path / "whole")
    assert shared == whole
    assert len({answer for answer, *_ in shared.values()}) > 3, "all answers equal: nothing is tested"


def test_prompts_of_stages_are_not_shared() -> None:
    from gap_export.bundle.manifest import Pruning, Stage
    from gap_export.runtime.shared_prefix import unshared_because

    manifest = type("Manifest", (), {})()
    stage = Stage(first_layer=0, layers=1, kept=4, capacity=16)
    manifest.pruning = Pruning.model_construct(pruner="fastv", kept=4, stages=(stage, stage))
    assert "fastv drops tokens inside the decoder" in str(unshared_because(manifest, Tokenizer(BPE())))


def test_a_run_that_stopped_goes_on(
    tiny_bundle: Callable[..., Bundle], expressions: Any, source: Any, tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    session, work = open_session(bundle, "onnxruntime", threads=1), work_of(expressions, source)
    undisturbed = answered(Evaluator(bundle, session), work, source, tmp_path / "undisturbed")

    class Stop(Exception):
        pass

    def stop(recorded: Recorded) -> None:
        if sum(recorded.counts) >= 6:
            raise Stop

    journal = open_journal(tmp_path / "stopped", SETTINGS)
    with pytest.raises(Stop):
        answer_all(lambda: Evaluator(bundle, session), work, source, journal, progress=Recorded(stop))
    assert len(journal.rows) == 6
    asked: list[list[str]] = []

    class Watching(Evaluator):
        def answer_image(self, image: Any, texts: Any) -> Any:
            asked.append(list(texts))
            return super().answer_image(image, texts)

    assert answered(Watching(bundle, session), work, source, tmp_path / "stopped") == undisturbed
    assert sum(map(len, asked)) == len(expressions) - 6


def test_missing_images_are_counted_and_not_scored(
    tiny_bundle: Callable[..., Bundle], expressions: Any, source: Any, tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    extra = [Expression(f"lost{n}", "lost.png", "cat", (0.0, 0.0, 1.0, 1.0)) for n in range(4)]
    work = work_of([*extra, *expressions], source)
    assert (work.missing, work.not_asked) == (("lost.png",), tuple(each.id for each in extra))
    journal = open_journal(tmp_path, SETTINGS)
    session = open_session(bundle, "onnxruntime", threads=1)
    answer_all(lambda: Evaluator(bundle, session), work, source, journal)
    protocol = protocol_of("unc", bundle.manifest.box)
    scored = score_all(work.expressions, journal.rows, protocol, bundle.manifest.layout)
    record = record_of(scored, protocol, split="val", backend="onnxruntime", work=work)
    assert (record.expressions, record.images) == (18, 3)
    assert (record.missing_images, record.not_scored) == (1, 4)
    with pytest.raises(InputError, match="none of the 1 images is there"):
        work_of(extra, source)


def test_expressions_that_cannot_be_asked_are_misses_with_a_reason(
    tiny_bundle: Callable[..., Bundle], source: Any
) -> None:
    bundle = tiny_bundle()
    evaluator = Evaluator(bundle, open_session(bundle, "onnxruntime", threads=1))
    answers = evaluator.answer_image(source.open("0.png"), ["cat", "cat " * 200, "<image>", "cat"])
    assert [each.refused is None for each in answers] == [True, False, False, True]
    assert answers[0].text == answers[3].text
    assert answers[1].text == ""


def test_results_are_a_table(
    tiny_bundle: Callable[..., Bundle], expressions: Any, source: Any, tmp_path: Path
) -> None:
    from pyarrow import parquet

    bundle = tiny_bundle()
    work = work_of(expressions, source, limit=7)
    journal = open_journal(tmp_path / "run", SETTINGS)
    session = open_session(bundle, "onnxruntime", threads=1)
    answer_all(lambda: Evaluator(bundle, session), work, source, journal)
    scored = score_all(work.expressions, journal.rows, protocol_of("unc", bundle.manifest.box))
    write_results(scored, tmp_path / "results.parquet")
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["id"] for row in rows] == [each.id for each in work.expressions]
    assert {row["truth"][3] for row in rows} == {25.0}
    assert all((row["box"] is None) == (row["no_box_because"] is not None) for row in rows)


PERFECT = '{"id": "%s", "answer": "[0.0250, 0.1917, 0.5000, 0.7667]"}\n'


def test_answers_from_elsewhere(expressions: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(PERFECT % each.id for each in expressions))
    protocol = protocol_of("unc", _padded())
    rows = read_predictions(path, expressions, None)
    record = record_of(score_all(expressions, rows, protocol), protocol, split="val", backend="predictions")
    assert (record.expressions, record.accuracy, record.unparsable) == (18, 1.0, 0)
    unknown = [Expression(each.id, each.image, each.text, each.box) for each in expressions]
    with pytest.raises(InputError, match="size that is not in the annotations"):
        read_predictions(path, unknown, None)
    sized = InMemory({f"{image}.png": noise(image) for image in range(3)})
    assert read_predictions(path, unknown, sized) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PERFECT % "cat/0" + PERFECT % "cat/0", "answers cat/0 again"),
        (PERFECT % "nobody", "answers nobody, which the data set does not have"),
        ("7\n", "is not {id, answer}"),
        ('{"id": "cat/0", "answer": 3}\n', "no text"),
        ("{", "is not {id, answer}"),
    ],
)
def test_answers_that_cannot_be_used(text: str, message: str, expressions: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_predictions(path, expressions, None)


def test_an_expression_without_an_answer_is_named(expressions: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(PERFECT % expressions[0].id)
    rows = read_predictions(path, expressions, None)
    with pytest.raises(InputError, match="has no answer"):
        score_all(expressions, rows, protocol_of("unc", _padded()))


def test_pixels_of_the_image_as_seen_need_its_size(expressions: Any, tmp_path: Path) -> None:
    from gap_export.bundle.manifest import BoxFormat
    from gap_export.inputs.layouts import NativeResolutionLayout

    path = tmp_path / "answers.jsonl"
    answer = '{"id": "%s", "answer": "{\\"bbox_2d\\": [2, 4, 40, 50]}"}\n'
    path.write_text("".join(answer % each.id for each in expressions))
    protocol = protocol_of("unc", BoxFormat(codec="qwen2_5_vl", frame="image"))
    rows = read_predictions(path, expressions, None)
    with pytest.raises(InputError, match="how large that was is not known"):
        score_all(expressions, rows, protocol)
    plain = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    native = NativeResolutionLayout(
        patch=14, merge=2, frames=2, min_pixels=80 * 60, max_pixels=10**6, **plain
    )  # type: ignore[arg-type]
    (first, *_) = score_all(expressions, rows, protocol, native)
    assert first.score.box == pytest.approx((2 * 40 / 84, 4 * 30 / 84, 40 * 40 / 84, 50 * 30 / 84))


def test_images_of_a_folder_are_found_by_either_name(tmp_path: Path) -> None:
    inside = tmp_path / "train2014"
    inside.mkdir()
    noise(0).save(inside / "a.png")
    noise(1).save(tmp_path / "secret.png")
    folder = Folder(inside)
    assert folder.has("a.png")
    assert folder.has("coco/train2014/a.png")
    assert not folder.has("../secret.png")
    assert not folder.has(str(tmp_path / "secret.png"))
    (inside / "b.png").symlink_to(tmp_path / "secret.png")  # as caches of hubs and of data versions have it
    assert folder.has("b.png")
    assert folder.size("val/b.png") == (40, 30)
    assert folder.open("coco/a.png").size == (40, 30)
    with pytest.raises(InputError, match="is not a folder"):
        Folder(inside / "a.png")


def _padded() -> Any:
    from gap_export.bundle.manifest import BoxFormat

    return BoxFormat(codec="llava", frame="padded_square")
