"""Shared by all tests: a tiny LLaVA with random weights in Hugging Face layout, bundles built from it, its reference.

Building a bundle takes seconds, so each variant is built once per test session. Tests that damage a bundle or a checkpoint
work on copies.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Pruning
from gap_export.recipe.recipe import Recipe
from tests.guard import GUARD, Guard
from tests.trace_count import TraceCount

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer
    from tests.exported import GraphExporter

GRID = (6, 6)
IMAGE_TOKEN, EOS, VOCABULARY = 4, 2, 64
PROMPT = "USER : <image> where is {expression} ? ASSISTANT :"
WORDS = """
    USER : ? ASSISTANT where is the red green blue circle square triangle small large on left right of above below
    at top bottom [ ] , . 0 1 2 3 4 5 6 7 8 9 in a picture mug cat
"""

# A first example may import a package, and machines differ: how long an example takes says nothing.
settings.register_profile("gap-export", deadline=None)
settings.load_profile("gap-export")

# Assertions in modules of bodies shared by test modules explain themselves as those in the tests do.
pytest.register_assert_rewrite(
    *(f"tests.families.{name}" for name in ("answers", "contract", "plain_answers"))
)

BuildBundle = Callable[..., Bundle]

GUARD.install()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as on a terminal, also where whatever runs the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_configure(config: pytest.Config) -> None:
    """Graphs that were traced in an earlier run are taken from there, by all processes; those of the user are left alone."""
    kept = config.rootpath / ".pytest_cache"
    os.environ.setdefault("GAP_EXPORT_TRACE_CACHE", str(kept / "traces"))
    os.environ.setdefault("MPLCONFIGDIR", str(kept / "matplotlib"))
    config.pluginmanager.register(TraceCount(), "trace-count")


@pytest.fixture(scope="session", autouse=True)
def guarded(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Guard]:
    """Nothing is written outside the folders of this run; see `tests/guard.py` for what it cannot see."""
    kept = [pytestconfig.rootpath / name for name in (".pytest_cache", ".hypothesis")]
    traces = Path(os.environ["GAP_EXPORT_TRACE_CACHE"])  # another where the caller says so
    folders = [tmp_path_factory.getbasetemp(), Path("/proc"), traces, *kept]
    system = Path(tempfile.mkdtemp(prefix="gap-export-"))  # a short name: sockets are made in it
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"], tempfile.tempdir = str(system), None
    GUARD.allow([*folders, system])
    yield GUARD
    GUARD.allow([])
    os.environ.pop("TMPDIR")
    if before[0] is not None:
        os.environ["TMPDIR"] = before[0]
    tempfile.tempdir = before[1]
    shutil.rmtree(system, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_written_outside(guarded: Guard) -> Iterator[None]:
    """A test fails that was kept from writing outside."""
    yield
    guarded.check()


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS.split())])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _save_model(folder: Path, layers: int, width: int) -> None:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=36,
            patch_size=6,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID[0] * GRID[1],
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(7)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # Weights large enough that attention is sharp: a wrong position must show in the logits.
        for parameter in model.parameters():
            spread = 1.8 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            centre = 0.0 if parameter.dim() > 1 else float(parameter.mean() > 0.5)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def _save_checkpoint(folder: Path, *, layers: int, width: int) -> Path:
    folder.mkdir()
    _save_model(folder, layers, width)
    _save_tokenizer(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 36, "width": 36},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA: three-layer CLIP tower, two-layer Llama (4 heads on 2), 36 visual tokens, fp32, one safetensors file."""
    return _save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llava", layers=2, width=32)


@pytest.fixture(scope="session")
def deep_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a Llama of four layers, for strategies that prune between them, and heads that engines have kernels for."""
    return _save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "deep-llava", layers=4, width=64)


def _save_text_tower(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel

    begin, end = "<|startoftext|>", "<|endoftext|>"
    words = [*dict.fromkeys(WORDS.lower().split()), "<unk>", begin, end]
    vocabulary = {word: index for index, word in enumerate(words)}
    torch.manual_seed(5)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "eos_token_id": vocabulary[end],
            "projection_dim": 16,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 36,
            "patch_size": 6,
            "projection_dim": 16,
        },
        projection_dim=16,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for words to matter
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(word, vocabulary[word]) for word in (begin, end)]
    )
    tokenizer.add_special_tokens([begin, end])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny_text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP with random weights in Hugging Face layout: text tower of two layers, projections to 16, 12 tokens of context."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-clip"
    folder.mkdir()
    _save_text_tower(folder)
    return folder


@pytest.fixture(scope="session")
def text_ids(tiny_text_tower: Path) -> NDArray[np.int64]:
    """[4, 7] int64: four expressions for the tiny text tower, short ones filled with the token that ends them."""
    from gap_export.inputs.prompt import TextTower, encode_text
    from gap_export.inputs.tokenizer import load_tokenizer

    tower = TextTower(checkpoint="tiny", context=12, width=16, vocabulary=64, aligned_inversely=True)
    expressions = ["the red mug", "a cat", "the small blue circle left", "square"]
    return encode_text(load_tokenizer(tiny_text_tower / "tokenizer.json"), tower, expressions)


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tiny_options(tiny_checkpoint: Path, tiny_text_tower: Path) -> dict[str, Any]:
    """Recipe fields of the tiny checkpoint."""
    return {
        "text_tower": str(tiny_text_tower),
        "name": "tiny",
        "checkpoint": str(tiny_checkpoint),
        "prompt": PROMPT,
        "max_new_tokens": 5,
        "max_text": 24,
        "max_batch": 4,
    }


@pytest.fixture(scope="session")
def tracer() -> Tracer:
    """Traces whatever is built, each graph once per version of the sources: see `pytest_configure`."""
    from gap_export.graph.trace_cache import Tracer
    from gap_export.graph.trace_folder import user_folder

    return Tracer(user_folder(), remembered=64)


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tracer: Tracer
) -> Callable[..., Bundle]:
    """`tiny_bundle(precision=..., keep=..., positions=..., pruner=...)`: a bundle, built on first use. Not to be changed."""
    folder = tmp_path_factory.mktemp("bundles")
    built: dict[str, Bundle] = {}

    def bundle(**changes: Any) -> Bundle:
        name = "-".join(f"{key}={changes[key]}" for key in sorted(changes)) or "default"
        if name not in built:
            from gap_export.pipeline.build import build

            recipe = Recipe.model_validate({**tiny_options, **changes})
            built[name] = build(recipe, folder / name, golden=False, tracer=tracer).bundle
        return built[name]

    return bundle


@pytest.fixture(scope="session")
def ranges(tiny_bundle: BuildBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the activations of the default tiny bundle, for precisions that need them."""
    from gap_export.evaluation.calibrate import calibrate

    path = tmp_path_factory.mktemp("ranges") / "ranges.json"
    path.write_text(calibrate(tiny_bundle().folder, limit=4, threads=1).model_dump_json())
    return path


@pytest.fixture(scope="session")
def low(tiny_bundle: BuildBundle, ranges: Path) -> Callable[[str], Bundle]:
    """`low(precision)`: the tiny bundle in that precision."""
    from gap_export.precision import PRECISIONS

    def bundle(precision: str) -> Bundle:
        fixed = {"ranges": str(ranges)} if PRECISIONS[precision].needs_ranges else {}
        return tiny_bundle(precision=precision, **fixed) if precision != "fp32" else tiny_bundle()

    return bundle


@pytest.fixture(scope="session")
def golden_bundle(tiny_bundle: BuildBundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The default tiny bundle with a golden request, which logits decide: its weights know nothing of boxes. Not to be changed."""
    from gap_export.pipeline.golden import add_golden

    folder = tmp_path_factory.mktemp("golden") / "bundle"
    return add_golden(
        Path(shutil.copytree(tiny_bundle().folder, folder, ignore=shutil.ignore_patterns("reports")))
    )


@pytest.fixture
def bundle_copy(tiny_bundle: BuildBundle, tmp_path: Path) -> Path:
    """Folder of the default tiny bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle().folder, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def tiny_reference(tiny_checkpoint: Path, tiny_text_tower: Path) -> Callable[[Pruning], Any]:
    """`tiny_reference(pruning)`: the PyTorch session of the tiny checkpoint."""
    sessions: dict[str, Any] = {}

    def session(pruning: Pruning) -> Any:
        from gap_export import prune
        from gap_export.inputs.prompt import TextTower
        from gap_export.runtime.torch.staged import open_reference
        from gap_export.runtime.torch.text_reference import TextReference

        key = pruning.model_dump_json()
        if key not in sessions:
            text_tower = None
            if prune.row(pruning.pruner).needs_text:
                facts = TextTower(
                    checkpoint="tiny", context=12, width=16, vocabulary=64, aligned_inversely=True
                )
                text_tower = TextReference(tiny_text_tower, facts)
            sessions[key] = open_reference("llava", tiny_checkpoint, pruning, text_tower=text_tower)
        return sessions[key]

    return session


@pytest.fixture(scope="session")
def deep_bundle(
    deep_checkpoint: Path,
    tiny_options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tracer: Tracer,
) -> Callable[..., Bundle]:
    """`deep_bundle(pruner=..., positions=..., ...)`: a bundle of the deep checkpoint that keeps a quarter, built on first use."""
    from gap_export.pipeline.build import build

    folder = tmp_path_factory.mktemp("deep-bundles")
    built: dict[str, Bundle] = {}

    def bundle(**changes: Any) -> Bundle:
        name = "-".join(f"{key}={changes[key]}" for key in sorted(changes)) or "default"
        if name not in built:
            options = {**tiny_options, "checkpoint": str(deep_checkpoint), "keep": 0.25, **changes}
            built[name] = build(
                Recipe.model_validate(options), folder / name, golden=False, tracer=tracer
            ).bundle
        return built[name]

    return bundle


@pytest.fixture(scope="session")
def tiny_graph(
    tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tracer: Tracer
) -> GraphExporter:
    """`tiny_graph("vision", pruner=..., keep=...)`: one graph of what `tiny_bundle` would build."""
    from tests.exported import GraphExporter

    return GraphExporter(tmp_path_factory.mktemp("tiny-graphs"), tiny_options, tracer)


@pytest.fixture(scope="session")
def deep_graph(
    deep_checkpoint: Path,
    tiny_options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tracer: Tracer,
) -> GraphExporter:
    """`deep_graph("prefill", pruner=..., positions=...)`: one graph of what `deep_bundle` would build."""
    from tests.exported import GraphExporter

    options = {**tiny_options, "checkpoint": str(deep_checkpoint), "keep": 0.25}
    return GraphExporter(tmp_path_factory.mktemp("deep-graphs"), options, tracer)


@pytest.fixture(scope="session")
def deep_reference(deep_checkpoint: Path) -> Callable[[Pruning], Any]:
    """`deep_reference(pruning)`: the PyTorch session of the deep checkpoint."""
    from gap_export.runtime.torch.staged import open_reference

    return lambda pruning: open_reference("llava", deep_checkpoint, pruning)


@pytest.fixture(scope="session")
def questions() -> NDArray[np.int64]:
    """[4, 9] int64: prompts of different length that end with text: the image first, inside, and last but one."""
    rows = [
        [1, 5, 6, IMAGE_TOKEN, 7, 8, 9, 10, 11],
        [IMAGE_TOKEN, 12, 13, 14, 15],
        [1, 16, 17, 18, 19, IMAGE_TOKEN, 20],
        [1, IMAGE_TOKEN, 21, 22],
    ]
    ids = np.full((4, 9), -1, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids


@pytest.fixture(scope="session")
def pixels() -> NDArray[np.float32]:
    """[4, 3, 36, 36] float32: four images for the tiny tower."""
    return np.random.default_rng(3).normal(size=(4, 3, 36, 36)).astype(np.float32)


@pytest.fixture(scope="session")
def ragged_ids() -> NDArray[np.int64]:
    """[4, 9] int64: prompts of different length with the placeholder first, inside and last, padded with -1."""
    rows = [
        [1, 5, 6, IMAGE_TOKEN, 7, 8, 9, 10, 11],
        [IMAGE_TOKEN, 12, 13, 14, 15],
        [1, 16, 17, 18, 19, IMAGE_TOKEN],
        [1, IMAGE_TOKEN, 20],
    ]
    ids = np.full((4, 9), -1, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 48 x 40 PNG of noise."""
    path = tmp_path_factory.mktemp("images") / "noise.png"
    noise = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path
