"""Validation on a text: small models with random weights, read by ONNX Runtime and by PyTorch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.hashes import record_of
from gap_export.errors import BundleError, CheckpointError, InputError, SessionError
from gap_export.evaluation import validate_text as module
from gap_export.evaluation.bundle_reports import CURRENT, STALE, TEXT_PARITY, read_report
from gap_export.evaluation.report.terminal import bundle_facts
from gap_export.evaluation.scoring import BundleScorer
from gap_export.evaluation.text_parity import CONTROL, TextReport
from gap_export.evaluation.validate_text import validate_text
from gap_export.pipeline.build import RANDOM
from gap_export.precision import PRECISIONS
from tests.prose import prose
from tests.recorded import Recorded

BuildBundle = Callable[..., Bundle]

LONGEST = 256
"""Positions that the tiny models were trained for."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prose(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Bundle], Bundle]:
    """Of a bundle: reports are left in it."""

    def copied(bundle: Bundle) -> Bundle:
        folder = shutil.copytree(bundle.folder, tmp_path / "bundle", ignore=shutil.ignore_patterns("reports"))
        return open_bundle(folder)

    return copied


def report_of(bundle: Bundle, text: Path, **options: Any) -> tuple[TextReport, Recorded]:
    told = Recorded()
    report = validate_text(bundle, text, threads=1, progress=told, **options)
    stored = TextReport.read(bundle.reports / TEXT_PARITY, hint="")
    assert stored.text() == report.text()
    assert [sum(told.counts)] == told.totals
    return report, told


def failed(report: TextReport) -> set[str]:
    return {gate.name for gate in report.gates if not gate.passed}


# What is measured


def test_a_right_bundle_reads_as_pytorch(
    tiny_bundle: BuildBundle, copy: Callable[[Bundle], Bundle], text: Path
) -> None:
    bundle = copy(tiny_bundle())
    report, told = report_of(bundle, text, tokens=40)
    assert report.ok, report
    report.raise_for_gates()
    assert report.prefill is not None
    assert (report.prefill.tokens, report.steps.tokens) == (40, LONGEST - 40 - 1), "nothing follows the last"
    for part in (report.prefill, report.steps):
        assert abs(part.perplexity_rise) < 1e-4
        assert part.mean_kl < 1e-6
        assert part.top1_agreement == 1.0
        assert part.perplexity > 2, "or there was nothing to be right about"
    assert report.manifest_sha256 == bundle.manifest_sha256
    assert (report.source, report.source_sha256) == (
        text.name,
        hashlib.sha256(text.read_bytes()).hexdigest(),
    )
    assert {gate.name.partition(":")[0] for gate in report.gates} == {"prefill", "steps"}
    assert told.messages == [
        "reading with PyTorch",
        "reading with onnxruntime",
        f"negative control: {CONTROL}",
    ]
    open_bundle(bundle.folder, every_hash=True)


@pytest.mark.parametrize(("precision", "most_kl", "may_miss"), [
    ("int8", 0.02, set()),
    # Weights that are random prefer no word by much, and four bits change which one it is.
    ("int4", 0.8, {"mean_kl", "top1_agreement"}),
])  # fmt: skip
def test_rounded_weights_read_nearly_as_pytorch(
    low: Callable[[str], Bundle],
    copy: Callable[[Bundle], Bundle],
    text: Path,
    precision: str,
    most_kl: float,
    may_miss: set[str],
) -> None:
    """In one long call as well as token by token: a scale that all tokens of a call share would show in the first alone."""
    report, _ = report_of(copy(low(precision)), text)
    assert report.prefill is not None
    for part in (report.prefill, report.steps):
        assert part.tokens in (LONGEST // 2, LONGEST // 2 - 1)
        assert 0 < part.mean_kl < most_kl
        assert abs(part.perplexity_rise) < 0.4
    assert report.prefill.mean_kl < 2 * report.steps.mean_kl
    assert report.control_caught
    assert {name.partition(": ")[2] for name in failed(report)} <= may_miss


def test_openvino_reads_the_first_call_and_hands_its_cache_over(
    tiny_bundle: BuildBundle,
    copy: Callable[[Bundle], Bundle],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    openvino_graph = pytest.importorskip("gap_export.runtime.openvino_graph")
    calls: list[tuple[int, ...]] = []
    run = openvino_graph.OpenVINOGraph.run

    def counted(self: Any, inputs: Any, outputs: Any) -> Any:
        calls.append(inputs["inputs_embeds"].shape)
        return run(self, inputs, outputs)

    monkeypatch.setattr(openvino_graph.OpenVINOGraph, "run", counted)
    bundle = copy(tiny_bundle())
    report, told = report_of(bundle, text, tokens=40, backend="openvino")
    assert report.ok, report
    assert [shape[:2] for shape in calls] == [(1, 40), (1, 40)], "once as it is, once with ids halved"
    assert report.backend == "openvino"
    assert "reading with openvino" in told.messages
    assert sorted(path.name for path in bundle.reports.iterdir()) == [TEXT_PARITY]

    def elsewhere(self: Any, inputs: Any, outputs: Any) -> Any:
        return run(
            self,
            inputs,
            {name: array + 0 for name, array in outputs.items()},
        )

    monkeypatch.setattr(openvino_graph.OpenVINOGraph, "run", elsewhere)
    report, _ = report_of(bundle, text, tokens=40, backend="openvino")
    assert {name.partition(":")[0] for name in failed(report)} == {"steps"}, "a cache that is not handed over"


def test_a_runtime_that_gives_one_row_reads_no_text(
    tiny_bundle: BuildBundle, deep_bundle: BuildBundle, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_read", None)
    with pytest.raises(InputError, match="only onnxruntime and openvino give the logits of every token"):
        validate_text(tiny_bundle(), text, backend="torch")
    with pytest.raises(InputError, match="fastv drops tokens between layers"):
        validate_text(deep_bundle(pruner="fastv"), text, backend="openvino:bf16")


def test_wrong_ids_show(
    tiny_bundle: BuildBundle,
    copy: Callable[[Bundle], Bundle],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle that numbers its tokens wrongly misses gates; a control that changes nothing is not caught."""
    bundle, read = copy(tiny_bundle()), BundleScorer.read

    def renumbered(self: BundleScorer, ids: Any, first: int) -> Any:
        """Decoding goes on three ids too late."""
        self.renumber = lambda ids_T: ids_T + 3 * (first > 0)
        return read(self, ids, first)

    monkeypatch.setattr(BundleScorer, "read", renumbered)
    wrong, _ = report_of(bundle, text)
    assert not wrong.ok
    assert failed(wrong) == {f"steps: {name}" for name in ("perplexity_rise", "mean_kl", "top1_agreement")}

    def blind(self: BundleScorer, ids: Any, first: int) -> Any:
        self.renumber = None
        return read(self, ids, first)

    monkeypatch.setattr(BundleScorer, "read", blind)
    unnoticed, _ = report_of(bundle, text)
    assert not failed(unnoticed)
    assert not unnoticed.control_caught
    assert not unnoticed.ok


def test_logits_that_are_no_numbers_pass_no_gate(
    tiny_bundle: BuildBundle,
    copy: Callable[[Bundle], Bundle],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = BundleScorer.read
    monkeypatch.setattr(BundleScorer, "read", lambda *given: read(*given) * np.float32("nan"))
    report, _ = report_of(copy(tiny_bundle()), text)
    assert not report.ok
    assert len(failed(report)) == 6 or failed(report) >= {"prefill: mean_kl", "steps: mean_kl"}
    assert math.isnan(report.steps.mean_kl)


def test_a_decoder_that_drops_tokens_reads_them_one_by_one(
    deep_bundle: BuildBundle, copy: Callable[[Bundle], Bundle], text: Path
) -> None:
    """No image, nothing to drop: its decode graph alone is run, over the caches of both stages."""
    report, _ = report_of(copy(deep_bundle(pruner="fastv", positions="gap")), text)
    assert report.prefill is None
    assert report.steps.tokens == LONGEST - 1
    assert report.steps.mean_kl < 1e-6
    assert {gate.name.partition(":")[0] for gate in report.gates} == {"steps"}
    assert report.control_caught
    assert report.ok, report


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_short_cache_reads_fewer_tokens(
    tiny_bundle: BuildBundle, copy: Callable[[Bundle], Bundle], text: Path, tokens: int
) -> None:
    """All of its slots, and no more; and at least half of them one by one."""
    report, _ = report_of(copy(tiny_bundle(capacity=128)), text, tokens=tokens)
    prefilled = min(tokens, 64)
    assert report.prefill is not None
    assert (report.prefill.tokens, report.steps.tokens) == (prefilled, 128 - prefilled - 1)
    assert report.ok, report


# Where it is left


def test_the_report_is_of_one_build(
    tiny_bundle: BuildBundle, copy: Callable[[Bundle], Bundle], text: Path
) -> None:
    bundle = copy(tiny_bundle())
    report, _ = report_of(bundle, text, tokens=8)
    assert read_report(bundle, TEXT_PARITY, TextReport, command="validate --text") == report
    assert bundle_facts(bundle)["reports"] == {TEXT_PARITY: CURRENT}
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"versions": {"onnx": "0"}}))
    rebuilt = open_bundle(bundle.folder)
    assert read_report(rebuilt, TEXT_PARITY, TextReport, command="validate --text") is None
    assert bundle_facts(rebuilt)["reports"] == {TEXT_PARITY: STALE}
    report_of(rebuilt, text, tokens=8)
    assert bundle_facts(rebuilt)["reports"] == {TEXT_PARITY: CURRENT}


def test_a_file_that_is_no_report_stays(
    tiny_bundle: BuildBundle, copy: Callable[[Bundle], Bundle], text: Path
) -> None:
    bundle = copy(tiny_bundle())
    bundle.reports.mkdir()
    mine = bundle.reports / TEXT_PARITY
    mine.write_text(json.dumps({"notes": "mine"}))
    with pytest.raises(BundleError, match="report of gap-export"):
        validate_text(bundle, text)
    assert json.loads(mine.read_text()) == {"notes": "mine"}


# What is refused, before any weights are read


def empty(folder: Path) -> Path:
    return written(folder, b"")


def short(folder: Path) -> Path:
    return prose(folder, 60)


def latin(folder: Path) -> Path:
    return written(folder, "caf\u00e9".encode("latin-1"))


def wide(folder: Path) -> Path:
    """UTF-16 without a byte order mark is UTF-8 too, of a kind."""
    return written(folder, prose(folder).read_text().encode("utf-16-le"))


def missing(folder: Path) -> Path:
    return folder / "nowhere.txt"


def a_folder(folder: Path) -> Path:
    return folder


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def written(folder: Path, content: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (empty, r"text\.txt: has 1 tokens, and 256 are read"),
        (short, r"prose\.txt: has 61 tokens, and 256 are read"),
        (latin, "line 1: is not UTF-8: byte 0xe9 at column 4"),
        (wide, r"text\.txt: holds null bytes, as UTF-16 does"),
        (missing, r"nowhere\.txt: cannot be read: No such file or directory"),
        (a_folder, "is a folder"),
        (a_pipe, "is a pipe"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_texts_that_cannot_be_read(
    tiny_bundle: BuildBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[[Path], Path],
    message: str,
) -> None:
    monkeypatch.setattr(module, "_read", None)
    with pytest.raises(InputError, match=message) as caught:
        validate_text(tiny_bundle(), made(tmp_path))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_tokens_that_the_model_has_no_embedding_of(
    tiny_bundle: BuildBundle, copy: Callable[[Bundle], Bundle], tmp_path: Path
) -> None:
    """A tokenizer may know more names than the model has embeddings of."""
    bundle = copy(tiny_bundle())
    tokenizer = bundle.folder / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["zebra"] = 900
    tokenizer.write_text(json.dumps(content))
    files = {**bundle.manifest.files, tokenizer.name: record_of(tokenizer)}
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"files": files}))
    text = prose(tmp_path)
    text.write_text("a zebra " + text.read_text())
    with pytest.raises(
        InputError, match=r"has the token 900 \('zebra'\), and the model has an embedding of 64"
    ):
        validate_text(bundle.folder, text)


@pytest.mark.parametrize("tokens", [0, -1, 10**9, 2.5, True, "many"])
def test_tokens_are_a_count(tiny_bundle: BuildBundle, text: Path, tokens: Any) -> None:
    with pytest.raises(InputError, match=r"tokens .* is not a whole number from 1 to 1000000"):
        validate_text(tiny_bundle(), text, tokens=tokens)


def test_random_weights_need_their_folder(
    tiny_bundle: BuildBundle, tiny_checkpoint: Path, copy: Callable[[Bundle], Bundle], text: Path
) -> None:
    bundle = copy(tiny_bundle())
    recipe = bundle.manifest.recipe.model_copy(update={"weights": RANDOM})
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"checkpoint": RANDOM, "recipe": recipe}))
    bundle = open_bundle(bundle.folder)
    with pytest.raises(BundleError, match="random weights, which predict nothing") as caught:
        validate_text(bundle, text)
    assert "--checkpoint FOLDER" in caught.value.hint
    assert report_of(bundle, text, tokens=8, checkpoint=tiny_checkpoint)[0].ok


def test_a_checkpoint_that_is_gone(tiny_bundle: BuildBundle, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        validate_text(tiny_bundle(), text, checkpoint=tmp_path / "gone")


def test_a_precision_without_cpu_kernels_is_refused_before_pytorch_reads(
    tiny_bundle: BuildBundle, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_read", None)
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], cpu=False))
    with pytest.raises(SessionError, match="fp32 graphs have no CPU kernels"):
        validate_text(tiny_bundle(), text)
