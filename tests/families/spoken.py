"""Small checkpoints that are spoken to as the published ones are: their chat templates, and tokenizers that know the names in them.

Random weights say anything. What a family takes for an image must not be among it: transformers would look for an image there. So
the last layer never prefers those tokens.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from gap_export.bundle.folder import Bundle
from gap_export.families import frames
from tests.families.answers import Tiny
from tests.families.reduced import BOS, EOS, IMAGE_TOKEN, VOCABULARY
from tests.families.tiny_families import FAMILIES, TinyFamily, tile_inputs

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer

TEMPLATES = Path(__file__).parents[1] / "inputs" / "chat" / "templates"
WORDS = """
    USER : ? ASSISTANT where is the red green blue circle square triangle small large on left right of above below
    at top bottom [ ] , . 0 1 2 3 4 5 6 7 8 9 in a picture mug cat user assistant what and INST
"""

LLAVA = TinyFamily("llava", "llava-hf/llava-1.5-7b-hf", {}, {}, tile_inputs, {})
"""The small LLaVA of all tests, whose images are of one size."""

SPOKEN = {"llava": LLAVA, **FAMILIES}


@dataclass(frozen=True)
class Speech:
    """How a family's checkpoints are spoken to.

    Attributes:
        template: file in `TEMPLATES` that lies in the checkpoint; "" where it has none, and the family's frame is used.
        frame: the family's.
        placeholder: name of the token that stands for an image.
        image: what its processor writes for one, the placeholder once in it.
        special: id -> name of further special tokens.
        begins: whether the tokenizer puts a start token in front.
    """

    template: str
    frame: frames.Frame | None = None
    placeholder: str = "<image>"
    image: str = "<image>"
    special: tuple[tuple[int, str], ...] = ()
    begins: bool = True

    @property
    def jinja(self) -> str:
        """The template's text."""
        if self.template:
            return (TEMPLATES / f"{self.template}.jinja").read_text()
        assert self.frame is not None
        return self.frame.template


_CHATML = ((58, "<|im_start|>"), (59, "<|im_end|>"))
_QWEN = (*_CHATML, (VOCABULARY - 3, "<|vision_end|>"), (VOCABULARY - 2, "<|vision_start|>"))
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_INTERNVL = (*_CHATML, (60, "<img>"), (61, "</img>"))

SPEECH: dict[str, Speech] = {
    "llava": Speech("llava_1_5"),
    "llava_next": Speech("", frames.LLAVA_NEXT_VICUNA),
    "llava_next_mistral": Speech("llava_next_mistral"),
    "llava_onevision": Speech("llava_onevision", special=_CHATML, begins=False),
    "internvl": Speech(
        "internvl3", None, "<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>", _INTERNVL, begins=False
    ),
    **{
        name: Speech(name, None, "<|image_pad|>", _QWEN_IMAGE, _QWEN, begins=False)
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    },
}
"""Family -> how it is spoken to."""

_NEVER_SAID = (IMAGE_TOKEN, *range(60, VOCABULARY))


def write_speech(folder: Path, speech: Speech) -> None:
    """Give a checkpoint a tokenizer and a chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = {0: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>", IMAGE_TOKEN: speech.placeholder}
    special |= dict(speech.special)
    words = iter(dict.fromkeys(WORDS.split()))
    names = [special.get(id_) or next(words, f"w{id_}") for id_ in range(VOCABULARY)]
    assert next(words, None) is None
    tokenizer = Tokenizer(models.WordLevel({name: id_ for id_, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(special[id_], special=True, normalized=False) for id_ in sorted(special)]
    )
    if speech.begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    if speech.template:
        (folder / "chat_template.jinja").write_text(speech.jinja)


def save_spoken(source: Path, folder: Path, name: str) -> Path:
    """A copy of a family's small checkpoint that can be spoken to."""
    shutil.copytree(source, folder)
    write_speech(folder, SPEECH[name])
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        (head,) = (key for key in weights if key.endswith("lm_head.weight"))
        weights[head][list(_NEVER_SAID)] = 0  # below the largest of 64 random logits
        save_file(weights, file, {"format": "pt"})
    return folder


def change_config(folder: Path, decoder: dict[str, Any]) -> None:
    """Give the decoder of a checkpoint other settings."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config).update(decoder)
    file.write_text(json.dumps(config))


def endless(bundle: Bundle, capacity: int | None = None) -> Bundle:
    """The same bundle, whose answers no token ends.

    Args:
        bundle: as built.
        capacity: slots of its cache, if not as built: graphs take any number, and those of other tests need not be traced again.
    """
    manifest = bundle.manifest
    changes: dict[str, Any] = {"prompt": manifest.prompt.model_copy(update={"eos_token_ids": ()})}
    if capacity is not None:
        stages = [stage.model_copy(update={"capacity": capacity}) for stage in manifest.pruning.stages]
        pruning = manifest.pruning.model_copy(update={"stages": tuple(stages)})
        changes |= {"capacity": capacity, "pruning": pruning}
    return Bundle(bundle.folder, manifest.model_copy(update=changes))


@dataclass(frozen=True)
class SpokenFamily:
    """A checkpoint that can be spoken to, and its bundles.

    Attributes:
        tiny: the checkpoint.
        speech: how.
    """

    tiny: Tiny
    speech: Speech

    def options(self, images: int = 1) -> dict[str, Any]:
        """Of a recipe: a grounding prompt in this tokenizer's words."""
        return {"prompt": f"USER : {' and '.join([self.speech.image] * images)} {{expression}} ? ASSISTANT :"}


def spoken_copy(name: str, source: Path, folder: Path, tracer: Tracer) -> SpokenFamily:
    """A small checkpoint, copied so that it can be spoken to.

    Args:
        name: key of `SPOKEN`.
        source: the checkpoint.
        folder: of the copy and its bundles.
        tracer: of the bundles.
    """
    checkpoint = save_spoken(source, folder / "checkpoint", name)
    return SpokenFamily(Tiny(SPOKEN[name], checkpoint, folder, tracer), SPEECH[name])


def with_decoder(spoken: SpokenFamily, folder: Path, decoder: dict[str, Any]) -> SpokenFamily:
    """The same weights under other settings of the decoder.

    Args:
        spoken: the checkpoint.
        folder: of the copy and its bundles.
        decoder: fields of its config.
    """
    tiny = spoken.tiny
    checkpoint = Path(shutil.copytree(tiny.checkpoint, folder / "checkpoint"))
    change_config(checkpoint, decoder)
    return replace(spoken, tiny=Tiny(tiny.family, checkpoint, folder, tiny.tracer))
