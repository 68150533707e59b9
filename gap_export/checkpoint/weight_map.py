"""Whether a checkpoint holds what its family says it holds: nothing missing, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, named

Prefixes = Mapping[str, Sequence[str]]
"""Prefix of a module's parameters -> prefixes under which published checkpoints keep them, the most common one first."""

# Tables that older versions of transformers stored, and that are computed today.
_COMPUTED = re.compile(r"(^|[./])(position_ids|rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


# Names that training programs give to what they wrap.
_WRAPPED = (
    (
        re.compile(
            r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module)\."
        ),
        "an adapter was saved with its base and not merged into it: save again behind peft's merge_and_unload()",
    ),
    (
        re.compile(r"^(module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\."),
        "the model was saved from inside a wrapper (DataParallel, FSDP, torch.compile, peft): save the model that it wraps, or take the "
        "prefix away from the names",
    ),
)

_TABLE, _HEAD = "embed_tokens.weight", "lm_head.weight"


def with_shared_table(prefixes: Prefixes, *, tied: bool) -> Prefixes:
    """The prefixes of a family, and where to find the token table, which is a module of its own in some graphs.

    Args:
        prefixes: with `language_model.` and `lm_head.`.
        tied: whether head and table may be one weight, stored under either name.
    """
    tables = [f"{prefix}embed_tokens.weight" for prefix in prefixes["language_model."]]
    heads = [f"{prefix}weight" for prefix in prefixes["lm_head."]]
    table = [*tables, *(heads if tied else ())]
    shared = {
        _TABLE: table,
        f"language_model.{_TABLE}": table,
        _HEAD: [*heads, *(tables if tied else ())],
    }
    return {**prefixes, **shared}


def find_key(checkpoint: Checkpoint, parameter: str, prefixes: Prefixes) -> str:
    """Key of a parameter.

    Args:
        checkpoint: with its companions.
        parameter: name in the traced module.
        prefixes: of the family; the longest that fits counts.

    Raises:
        CheckpointError: the checkpoint has it under none of the known names.
    """
    prefix = max((each for each in prefixes if parameter.startswith(each)), key=len, default="")
    rest = parameter.removeprefix(prefix)
    for candidate in prefixes.get(prefix, ()):
        if candidate + rest in checkpoint.weights:
            return candidate + rest
    hint = "a shard is missing, or the layout is not one of the published ones"
    if parameter == _HEAD:
        hint = (
            "where the head is the token embedding, which files then hold once, set tie_word_embeddings to true in config.json; "
            f"else {hint}"
        )
    raise CheckpointError(f"has no weight for {parameter}", subject=str(checkpoint.folder), hint=hint)


def check_known(
    checkpoint: Checkpoint, parameters: Iterable[str], prefixes: Prefixes, *, ignored: str = r"(?!)"
) -> None:
    """Refuse a checkpoint with weights that its model has no place for: it is of another model, or of another version of it.

    Args:
        checkpoint: with its companions.
        parameters: all of the model's, whether the graphs use them or not.
        prefixes: of the family.
        ignored: pattern of further keys that are known and not used.

    Raises:
        CheckpointError: names up to three of them.
    """
    known = set()
    for parameter in parameters:
        for prefix, candidates in prefixes.items():
            if parameter.startswith(prefix):
                known |= {candidate + parameter.removeprefix(prefix) for candidate in candidates}
    pattern = re.compile(ignored)
    left = [
        key
        for key in checkpoint.weights
        if key not in known and not _COMPUTED.search(key) and not pattern.match(key)
    ]
    if left:
        some = ", ".join(map(named, left[:3])) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        hint = "config and weights do not belong together, or the layout is not one of the published ones"
        raise CheckpointError(
            f"has weights that the model has no place for: {some}",
            subject=str(checkpoint.folder),
            hint=next((advice for pattern, advice in _WRAPPED if any(map(pattern.search, left))), hint),
        )
