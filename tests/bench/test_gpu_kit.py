"""`bench/gpu.py` without a GPU: it says so; and what it would run there is run on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gap_export.bundle.folder import Bundle
from gap_export.evaluation.latency.candidate import candidate
from gap_export.positions import advance
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import encode

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"
SERVED = {"gpu": {"memory_bytes": 10**12, "compute_capability": "8.9"}, "served": ["tensorrt-rtx"]}


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`kit("gpu_parts")`: a module of the script."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module


def settings_of(kit: Callable[[str], ModuleType], folder: Path, **changes: Any) -> Any:
    given = {"model": "7b", "precision": "fp16", "device": "cuda", "scratch": folder, **changes}
    return kit("gpu_settings").Settings(**given)


def logits_of(session: Any, bundle: Bundle, keep: float | None, steps: int) -> list[Any]:
    each = candidate("any", bundle, session, batch=2, keep=keep)
    spliced = session.splice(each.input_ids_BT, encode(session, each.images, keep_counts=each.keep_counts))
    turn, found = spliced.placement, []
    found.append(session.prefill(spliced.embeds, turn, reserve=steps + 1).logits.copy())
    for _ in range(steps):
        turn = advance(turn)
        found.append(session.step(found[-1].argmax(-1).astype(np.int64), turn).copy())
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run bench/gpu.py itself")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    record = tmp_path / "gpu.json"
    done = script("--output", record, "--scratch", tmp_path / "scratch")
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gpu"] is None
    assert all(reason.startswith("no GPU: ") for reason in found["skipped"].values())
    assert len(found["skipped"]) == len(found["parts"]) - 1
    assert not record.exists()  # it would replace that of a GPU


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_transformers_answers_as_the_unpruned_bundle(
    compiled: bool,
    kit: Callable[[str], ModuleType],
    tiny_bundle: Callable[..., Bundle],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # what is compiled is the same call
    bundle = tiny_bundle(pruner="cls_attention", keep="0.1:0.3:1.0")
    peers = kit("gpu_peers")
    model = peers.load_model(bundle, tiny_checkpoint, device="cpu")
    peer = peers.TransformersSession(bundle, model, compiled=compiled)
    ours = logits_of(open_session(bundle, "onnxruntime", threads=1), bundle, 1.0, 4)
    for _ in range(2):  # the second request finds the cache of the first
        for mine, theirs in zip(ours, logits_of(peer, bundle, 1.0, 4), strict=True):
            np.testing.assert_allclose(theirs, mine, atol=1e-4)
    assert len(peer._static) == int(compiled)


def test_the_parts_are_in_the_order_of_their_worth(kit: Callable[[str], ModuleType], tmp_path: Path) -> None:
    settings = settings_of(kit, tmp_path)
    parts = kit("gpu_parts").parts_of(settings)
    assert settings.onnxruntime == parts[1].work.keywords["backend"] == "onnxruntime:cuda"
    assert [part.name for part in parts] == [
        "what is there",
        "parity fp32",
        "parity fp16",
        "model",
        "speed beside transformers",
        "parity bf16",
        "parity tensorrt-rtx",
        "speed tensorrt-rtx",
        "parity onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "parity onnxruntime-ep-nv-tensorrt-rtx-cu12",
        "parity tensorrt",
        "speed tensorrt",
        "other shares and batches",
    ]
    # What is asked for first fits into the minutes that are usual.
    assert sum(part.seconds for part in parts[:6]) <= 8 * 60 - kit("gpu_schedule").MARGIN_SECONDS


@pytest.mark.parametrize(
    ("found", "missing", "name", "reason"),
    [
        ({}, {}, "parity fp32", "no GPU"),
        (SERVED, {}, "parity fp32", None),
        (
            SERVED,
            {"tensorrt": "tensorrt: TensorRT is not installed"},
            "parity tensorrt",
            "no library: tensorrt: ",
        ),
        (SERVED, {}, "parity tensorrt-rtx", None),
        (
            SERVED | {"not_served": {"tensorrt-rtx": "compute capability 9.0 is not served"}},
            {},
            "parity tensorrt-rtx",
            "compute capability 9.0",
        ),
        (
            SERVED,
            {},
            "parity onnxruntime-ep-nv-tensorrt-rtx-cu13",
            "no library: onnxruntime-ep-nv-tensorrt-rtx-cu13 is not installed",
        ),
        (
            SERVED | {"gpu": {"memory_bytes": 24 * 10**9}},
            {},
            "speed beside transformers",
            "memory: it needs about 32 GB",
        ),
        (SERVED, {}, "speed beside transformers", None),
    ],
)
def test_why_a_part_cannot_be_done(
    kit: Callable[[str], ModuleType],
    tmp_path: Path,
    found: dict[str, Any],
    missing: dict[str, str],
    name: str,
    reason: str | None,
) -> None:
    module, outcome = kit("gpu_parts"), kit("gpu_schedule").Outcome
    there = outcome("done", found=found, missing=missing)
    (part,) = (each for each in module.parts_of(settings_of(kit, tmp_path)) if each.name == name)
    said = part.obstacle({module.THERE: there})
    assert said is None if reason is None else said.startswith(reason)
    if name.startswith("speed"):  # without a model there is nothing to measure
        unmade = {module.THERE: there, module.MODEL: outcome("failed", "no space")}
        assert "memory" in said if said else "no space" in part.obstacle(unmade)


def test_engines_that_are_missing_cost_the_others_nothing(
    kit: Callable[[str], ModuleType],
    tiny_bundle: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(pruner="cls_attention", keep="0.1:0.3:1.0")
    settings = settings_of(kit, tmp_path, device="cpu", rounds=2, new_tokens=2)
    monkeypatch.setattr(type(settings), "build_measured", lambda self, target: bundle)
    told: list[tuple[str, Any]] = []
    tell = kit("gpu_schedule").Teller(told.append, Console(quiet=True))
    kit("gpu_speed").measure_engines(settings, tell, target="tensorrt")
    missing = {what: reason for kind, facts in told if kind == "missing" for what, reason in facts.items()}
    assert missing.keys() == {"load tensorrt", "tensorrt, CUDA graphs"}
    assert all("holds no tensorrt engine" in reason for reason in missing.values())
    ((_, found),) = (each for each in told if each[0] == "found")
    assert [(row["backend"], row["keep"]) for row in found["rows"]] == [
        ("onnxruntime", 1.0),
        ("onnxruntime", 0.25),
    ]
    assert {each["quantity"] for each in found["ratios"]} == {"ttft_ms", "tpot_ms"}


@pytest.mark.long
def test_the_whole_script_on_the_cpu(tmp_path: Path) -> None:
    record = tmp_path / "gpu.json"
    parts = (
        *("parity fp32", "model", "speed beside transformers", "parity bf16"),
        *("parity tensorrt-rtx", "speed tensorrt", "other shares and batches"),
    )
    done = script(
        *("--device", "cpu", "--model", "shapes", "--minutes", 60, "--parts", ",".join(parts)),
        *("--cases", 16, "--rounds", 2, "--new-tokens", 3),
        *("--output", record, "--scratch", tmp_path / "scratch"),
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert "Warning" not in done.stderr
    found = json.loads(record.read_text())
    assert found == json.loads(done.stdout.splitlines()[-1])
    assert found["finished"]
    assert list(found["parts"]) == ["what is there", *parts]
    outcomes = {name: (each["outcome"], each["reason"]) for name, each in found["parts"].items()}
    for name in ("what is there", "parity fp32", "model", "speed beside transformers"):
        assert outcomes[name] == ("done", "")
        assert not found["parts"][name]["missing"] or name == "what is there"
    assert outcomes["parity bf16"][0] == "failed"
    assert "bf16 graphs have no CPU kernels" in outcomes["parity bf16"][1]
    assert found["ok"] is (done.returncode == 0) is False
    assert found["skipped"].keys() == {"parity tensorrt-rtx", "speed tensorrt"}
    fp32 = found["parts"]["parity fp32"]["found"]
    assert fp32["passed"]
    assert fp32["beside_transformers"]["passed"]
    assert [control["caught"] for control in fp32["report"]["controls"]] == [True] * 5
    speed = found["parts"]["speed beside transformers"]["found"]
    backends = {"onnxruntime", "transformers sdpa", "transformers compile"}
    assert {row["backend"] for row in speed["rows"]} == backends
    assert speed["agreement"]["same_first_token"]
    assert speed["agreement"]["cosine"] > 0.999
    rest = found["parts"]["other shares and batches"]["found"]
    assert {row["keep"] for row in rest["rows"]} == {0.5, 0.1}
    assert {row["batch"] for row in rest["batch_rows"]} == {8}
