"""`bench/gpu.py` without a GPU: it says so; and what it would run there is put through its paces on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gap_export.bundle.folder import Bundle
from gap_export.errors import EngineError
from gap_export.evaluation.latency.candidate import candidate
from gap_export.evaluation.latency.cost import measure_device
from gap_export.positions import advance
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import encode

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.fixture
def kit(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose GPU is the CPU."""
    module = script("gpu")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "PROVIDER", "CPUExecutionProvider")
    return module


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
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stdout
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gpu"] is None
    assert found["missing"]["gpu"]


@pytest.mark.parametrize("compiled", [False, True])
def test_transformers_answers_as_the_unpruned_bundle(
    compiled: bool,
    kit: ModuleType,
    tiny_bundle: Callable[..., Bundle],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # what is compiled is the same call
    bundle = tiny_bundle(pruner="cls_attention", keep="0.1:0.3:1.0")
    peer = kit.TransformersSession(bundle, tiny_checkpoint, Namespace(precision="fp32"), compiled=compiled)
    ours = logits_of(open_session(bundle, "onnxruntime", threads=1), bundle, 1.0, 4)
    for mine, theirs in zip(ours, logits_of(peer, bundle, 1.0, 4), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-4)


def test_the_cuda_session_is_the_cpu_session_elsewhere(
    kit: ModuleType, tiny_bundle: Callable[..., Bundle]
) -> None:
    bundle = tiny_bundle(pruner="cls_attention", keep="0.1:0.3:1.0")
    session, plain = kit.cuda_session(bundle), open_session(bundle, "onnxruntime", threads=1)
    for keep in (1.0, 0.3, 1.0):
        for mine, theirs in zip(
            logits_of(session, bundle, keep, 4), logits_of(plain, bundle, keep, 4), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_what_is_missing_costs_nobody_else_anything(
    kit: ModuleType, tiny_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = tiny_bundle(pruner="cls_attention", keep="0.1:0.3:1.0")
    monkeypatch.setattr(kit, "built", lambda *arguments: bundle)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise EngineError("has no kernels here", subject="it", hint="none")

    monkeypatch.setattr(kit, "engine_session", refuse)
    monkeypatch.setattr(kit, "TransformersSession", type("Refusing", (), {"__init__": refuse}))
    report = kit.Report(Console(quiet=True))
    options = Namespace(
        model="shapes",
        keeps="1.0,0.3",
        batches="1,2",
        rounds=2,
        new_tokens=2,
        scratch=tmp_path,
        precision="fp16",
    )
    rows, ratios = kit.speed(report, ["tensorrt"], measure_device(1), options)
    assert [(row["keep"], row["batch"]) for row in rows] == [(1.0, 1), (0.3, 1), (1.0, 2), (0.3, 2)]
    assert {each["quantity"] for each in ratios} == {"ttft_ms", "tpot_ms"}
    assert set(report.missing) == {
        "tensorrt",
        "tensorrt, CUDA graphs",
        "transformers sdpa",
        "transformers compile",
    }
    assert "has no kernels here" in report.missing["tensorrt"]
