"""What families read from a checkpoint in the same way: its configuration, how images are prepared, which tokens end an answer, and
where transformers keeps its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.activations import ACT2FN

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.processor import stored_processor
from gap_export.checkpoint.weight_map import Prefixes
from gap_export.errors import CheckpointError, GapExportError, first_line, shown
from gap_export.inputs.layouts import AnyResLayout
from gap_export.modeling.field_values import VALUES
from gap_export.modeling.rope import max_positions, scaled_beyond

PREFIXES: Prefixes = {
    "vision_tower.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower."),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model.": ("language_model.model.", "model.language_model."),
    "lm_head.": ("language_model.lm_head.", "lm_head."),
    "image_newline": ("image_newline", "model.image_newline"),
}  # fmt: skip
"""Where published checkpoints keep what modules call by the name on the left: transformers before and after 4.52."""


OF_PROCESSOR = " of the image processor"
"""Ends the names of fields that do not stand in `config.json`."""


@dataclass(frozen=True)
class ConfigCheck:
    """Checks fields of a configuration, and names the model whose layout is expected.

    Attributes:
        checkpoint: whose configuration it is.
        model: e.g. `LLaVA-NeXT`.
    """

    checkpoint: Checkpoint
    model: str

    def __call__(self, field: str, holds: bool, wanted: str) -> None:
        """Refuse a configuration of which something does not hold.

        Args:
            field: of the configuration, for the message.
            holds: whether it is as this package expects.
            wanted: what is supported.

        Raises:
            CheckpointError: it does not hold.
        """
        if not holds:
            of_images = field.endswith(OF_PROCESSOR)
            file, _, content = (
                stored_processor(self.checkpoint)
                if of_images
                else ("config.json", "", self.checkpoint.config)
            )
            found = _found(content, field.removesuffix(OF_PROCESSOR))
            raise CheckpointError(
                f"{field} is not supported (supported: {wanted}){found}",
                subject=str(self.checkpoint.folder / file),
                hint=f"this model is not {self.model} as published; see `gap-export models`",
            )

    def path(self, part: str, field: str) -> str:
        """How a field of the decoder or the tower is called in the file: some files have the fields of a part outermost.

        Args:
            part: `text_config` or `vision_config`.
            field: name in it.
        """
        return f"{part}.{field}" if isinstance(self.checkpoint.config.get(part), dict) else field


def _found(content: Mapping[str, Any], field: str) -> str:
    """What a file says, for the end of a message; "" where it leaves the field to its default."""
    value: Any = content
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return "" if value is None else f": it is {shown(value)}"


_LONGEST_REASON = 300
MOST_TILES = 100
"""Along a side of a grid."""

BICUBIC = 3
"""Pillow's number, which is what is stored."""

NOTHING = r"(?!)"
"""Pattern of no key."""


Config = TypeVar("Config")


def accepted(make: Callable[[], Config], checkpoint: Checkpoint) -> Config:
    """What transformers makes of a checkpoint's `config.json`.

    Args:
        make: constructs it.
        checkpoint: whose file it is, for the message.

    Raises:
        CheckpointError: transformers does not accept it; with the field that it names.
        GapExportError: raised by `make` itself.
    """
    try:
        return make()
    except GapExportError:
        raise
    except Exception as error:  # transformers raises what it meets
        # What validates fields puts the reason into a second line, and what was tried behind the reason.
        cause = (error.__cause__ or error) if isinstance(error, StrictDataclassError) else error
        raise CheckpointError(
            f"is not a configuration transformers accepts: {first_line(cause).partition('. Errors: ')[0][:_LONGEST_REASON]}",
            subject=str(checkpoint.folder / "config.json"),
            hint="fetch the checkpoint's config.json again, or compare it with the model as published",
        ) from error


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration as transformers makes it of what was read of the file; the file is not read again.

    Raises:
        CheckpointError: it is not one that transformers accepts.
    """
    kind = CONFIG_MAPPING[checkpoint.model_type]
    return accepted(lambda: kind.from_dict(_given(checkpoint.config)), checkpoint)


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy: transformers writes into the settings of rotary embeddings. It takes a null in `auto_map` for a mapping."""
    return {
        name: _given(value) if isinstance(value, dict) else deepcopy(value)
        for name, value in config.items()
        if name != "auto_map" or value is not None
    }


def check_activations(checkpoint: Checkpoint) -> None:
    """Refuse activations that transformers has not.

    Args:
        checkpoint: whose `config.json` names them, outermost, in `text_config` and in `vision_config`.

    Raises:
        CheckpointError: there is none of that name.
    """
    for part in ("", "text_config", "vision_config"):
        fields = checkpoint.config.get(part) if part else checkpoint.config
        for field in ("hidden_act", "hidden_activation", "projector_hidden_act"):
            name = fields.get(field) if isinstance(fields, dict) else None
            if name is not None and (not isinstance(name, str) or name not in ACT2FN):
                raise CheckpointError(
                    f"{part}{'.' if part else ''}{field} is {shown(name)}, which transformers has no activation of",
                    subject=str(checkpoint.folder / "config.json"),
                    hint=f"names are like {', '.join(sorted(ACT2FN)[:4])}; fetch the checkpoint's config.json again",
                )


def llama_config(checkpoint: Checkpoint, **fields: Any) -> LlamaConfig:
    """The configuration of a Llama whose fields stand outermost.

    Args:
        checkpoint: with them.
        fields: in the place of the checkpoint's.

    Raises:
        CheckpointError: it is not one that transformers accepts.
    """
    return accepted(lambda: LlamaConfig.from_dict({**_given(checkpoint.config), **fields}), checkpoint)


def image_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings of the image processor, with `image_mean` and `image_std` known to be sound.

    Raises:
        CheckpointError: none there, or numbers that channels cannot be normalised by.
    """
    file, prefix, stored = stored_processor(checkpoint)
    mean, std = stored.get("image_mean"), stored.get("image_std")
    if mean is None or std is None:
        absent = f"{prefix}{'image_mean' if mean is None else 'image_std'}"
        raise CheckpointError(
            "has no image processor settings" + (f": no {absent}" if stored else f" ({file})"),
            subject=str(checkpoint.folder / file) if stored else str(checkpoint.folder),
            hint=f"download the checkpoint's {file}",
        )
    for name, value in (("image_mean", mean), ("image_std", std)):
        if not VALUES[name].holds(value):
            raise CheckpointError(
                f"{prefix}{name} is {shown(value)} (expected: {VALUES[name].wanted})",
                subject=str(checkpoint.folder / file),
                hint=f"fetch the checkpoint's {file} again",
            )
    return stored


def checked_processor(checkpoint: Checkpoint, check: ConfigCheck, size: int) -> dict[str, Any]:
    """Settings of the image processor where images or tiles are as large as the tower takes them, and made by one filter.

    Args:
        checkpoint: whose settings they are.
        check: names the model.
        size: side of the tower's images in pixels.

    Raises:
        CheckpointError: no sound settings, another size or another filter.
    """
    settings = image_processor(checkpoint)
    check(f"resample{OF_PROCESSOR}", settings.get("resample", BICUBIC) == BICUBIC, "3, bicubic")
    for name in ("size", "crop_size"):
        extent = settings.get(name) or {}
        sides = extent.values() if isinstance(extent, dict) else [extent]
        fits = all(side in (size, None) for side in sides)
        check(f"{name}{OF_PROCESSOR}", fits, f"{size}, as of the vision tower")
    return settings


def anyres_layout(checkpoint: Checkpoint, config: Any, check: ConfigCheck) -> AnyResLayout:
    """Tiles of LLaVA-NeXT and those that come after it, any number of them.

    Args:
        checkpoint: whose settings they are.
        config: of the model.
        check: names the model.

    Raises:
        CheckpointError: no sound settings, other tiles, or other grids than the config has.
    """
    vision = config.vision_config
    settings = checked_processor(checkpoint, check, vision.image_size)
    grids = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    same = settings.get("image_grid_pinpoints") or config.image_grid_pinpoints
    check(
        "image_grid_pinpoints",
        sorted(map(tuple, same)) == sorted(grids),
        "the same in config.json and preprocessor_config.json",
    )
    return AnyResLayout(
        size=vision.image_size,
        side=vision.image_size // vision.patch_size,
        grids=grids,
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )


def check_whole_tiles(config: Any, check: ConfigCheck) -> None:
    """Refuse grids that tiles do not fill.

    Raises:
        CheckpointError: there is one.
    """
    size = config.vision_config.image_size
    extents = [extent for grid in config.image_grid_pinpoints for extent in grid]
    check("image_grid_pinpoints", all(extent % size == 0 for extent in extents), "multiples of image_size")
    few = all(extent <= MOST_TILES * size for extent in extents)
    check("image_grid_pinpoints", few, f"at most {MOST_TILES} times image_size")


def feature_layer(
    number: Any, vision_config: Any, check: ConfigCheck, field: str = "vision_feature_layer"
) -> int:
    """How many layers of a tower are run.

    Args:
        number: counts hidden states, the embeddings being number 0; from the end, below 0. A list of one number is that number.
        vision_config: of the tower.
        check: names the model.
        field: that the number stands in.

    Raises:
        CheckpointError: several layers, or one that the tower has not.
    """
    if isinstance(number, list) and len(number) == 1:
        number = number[0]
    layers = int(vision_config.num_hidden_layers)
    check(field, type(number) is int, "one layer, not several")
    run = number if number >= 0 else layers + 1 + number
    check(field, 1 <= run <= layers, f"one of the tower's {layers} layers")
    return int(run)


GENERATION_CONFIG = "generation_config.json"


def end_tokens(checkpoint: Checkpoint, text_config: Any) -> tuple[tuple[int, ...], str]:
    """(Ids that end an answer, the file that says so), where transformers looks for them.

    Raises:
        CheckpointError: the checkpoint names none, or none that the model can write.
    """
    ends, file = checkpoint.json(GENERATION_CONFIG).get("eos_token_id"), GENERATION_CONFIG
    if ends is None:
        ends, file = text_config.eos_token_id, "config.json"
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(type(end) is int for end in ends):
        raise CheckpointError(
            "names no token that ends an answer (eos_token_id)",
            subject=str(checkpoint.folder),
            hint="add eos_token_id to the checkpoint's generation_config.json",
        )
    if not all(0 <= end < text_config.vocab_size for end in ends):
        raise CheckpointError(
            f"eos_token_id is {', '.join(map(str, ends[:9]))}, and the vocabulary ends at {text_config.vocab_size - 1}: no answer would end "
            "there",
            subject=str(checkpoint.folder / file),
            hint="correct it: the tokenizer that the checkpoint was published with says which token ends an answer",
        )
    return tuple(ends), file


def is_tied(config: Any) -> bool:
    """Whether the head is the token embedding."""
    return bool(config.tie_word_embeddings or getattr(config.text_config, "tie_word_embeddings", False))


def decoder_sizes(text_config: Any) -> dict[str, Any]:
    """The fields of `ModelSpec` that are about the decoder."""
    return {
        "hidden_size": text_config.hidden_size,
        "layers": text_config.num_hidden_layers,
        "attention_heads": text_config.num_attention_heads,
        "kv_heads": text_config.num_key_value_heads,
        "head_dim": getattr(text_config, "head_dim", None)
        or text_config.hidden_size // text_config.num_attention_heads,
        "vocabulary": text_config.vocab_size,
        "max_positions": max_positions(text_config),
        "scaled_beyond": scaled_beyond(text_config),
    }
