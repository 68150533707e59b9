"""Tokenizers of SentencePiece, with the ids that the slow tokenizers of transformers give, which originals of the Llama kind were trained
and are evaluated with.

SentencePiece writes a blank as `▁` and puts one before every text. Originals tokenize the texts before and behind an image, and slow
tokenizers those between added tokens, one by one, so that *every* piece of text begins with `▁`:

- LLaVA (transformers 4.31, 4.37; `mm_utils.tokenizer_image_token`) and MiniGPT-v2 (4.28, 4.30; `minigpt_base.get_context_emb`) split the
  prompt at their placeholder first. `legacy` of tokenizer_config.json, which is about text behind special tokens, changes nothing then.
- Shikra (4.28) has its placeholder among the added tokens, and slow tokenizers before 4.34 strip blanks on both sides of such.

transformers' own conversion puts `▁` before the first piece alone where `legacy` is false; older ones look for added tokens in normalised text,
where `<s>[INST]` has no `▁` behind `<s>` (transformers issues 23818 and 24569). Here a `tokenizer.model` is read with protobuf,
and no package of SentencePiece's is needed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.added_tokens import described_tokens, named_ids, truth
from gap_export.errors import CheckpointError, MissingRequirementError, named
from gap_export.files import kinds, read_bytes
from gap_export.inputs.tokenizer import tokenizer_errors

MODEL = "tokenizer.model"
_BLANK = "▁"
_BPE = 2
_LONGEST_PIECE = 1000
"""Characters; of those that are merged, SentencePiece makes at most 16 by default, and each is split at every place."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Types of models and of pieces in sentencepiece_model.proto."""


def read_sentencepiece(checkpoint: Checkpoint) -> Tokenizer | None:
    """A tokenizer from a model of SentencePiece.

    Args:
        checkpoint: with `tokenizer.model`; tokenizer_config.json beside it says whether texts begin and end with special tokens, and
            which were added, added_tokens.json has further ones and their ids.

    Returns:
        The tokenizer; None where the model is not BPE, the kind that Llama's is.

    Raises:
        CheckpointError: not such a file, or added tokens whose ids leave gaps.
        MissingRequirementError: protobuf is not installed.
    """
    file = checkpoint.folder / MODEL
    proto = _parsed(file)
    if proto.trainer_spec.model_type != _BPE:
        return None
    with tokenizer_errors(str(file), "is not a model of SentencePiece that tokenizers takes"):
        return _bpe(proto, checkpoint)


def _bpe(proto: Any, checkpoint: Checkpoint) -> Tokenizer:
    pieces = proto.pieces
    vocabulary = {piece.piece: id_ for id_, piece in enumerate(pieces)}
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(pieces, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.type == _BYTE for piece in pieces),
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_tokens(tokenizer, pieces, checkpoint)
    _add_ends(tokenizer, proto.trainer_spec, checkpoint)
    return tokenizer


def begin_every_piece(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer whose every piece of text between added tokens begins with `▁`, where it comes from SentencePiece.

    Args:
        tokenizer: read from a tokenizer.json; changed in place where it puts `▁` before the first piece alone.
    """
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        before = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([*before, *_blanks()])
        tokenizer.pre_tokenizer = None
    if not any(token.normalized for token in tokenizer.get_added_tokens_decoder().values()):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    if '"Prepend"' in json.dumps(content["normalizer"]):
        # Older conversions look for them in normalised text, as `▁<s>`, and take the mark of what follows with it.
        for token in content["added_tokens"]:
            token["normalized"] = False
    return Tokenizer.from_str(json.dumps(content))


def strip_around(tokenizer: Tokenizer, names: Collection[str]) -> Tokenizer:
    """The tokenizer with some of its added tokens taking the blanks beside them."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"] in names:
            token["lstrip"] = token["rstrip"] = True
    return Tokenizer.from_str(json.dumps(content))


def _parsed(file: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise MissingRequirementError(
            f"is needed to read {file.name}", subject="protobuf", hint="pip install protobuf"
        ) from error
    try:
        proto.ParseFromString(read_bytes(file, kinds.TOKENIZER))
    except CheckpointError:
        raise
    except Exception as error:  # protobuf has an error of its own in every version
        raise _damaged(file) from error
    if not proto.pieces or any(
        len(piece.piece) > _LONGEST_PIECE for piece in proto.pieces if piece.type == _NORMAL
    ):
        raise _damaged(file)
    return proto


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(
        "is not a model of SentencePiece",
        subject=str(file),
        hint="the download is incomplete or damaged: fetch it again",
    )


def _merges(pieces: Any, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make another one, the best of those first: what BPE merges, in SentencePiece's order."""
    merges = []
    joinable = {piece.piece for piece in pieces if piece.type == _NORMAL}
    for piece in pieces:
        if piece.type != _NORMAL:
            continue
        pairs = ((piece.piece[:length], piece.piece[length:]) for length in range(1, len(piece.piece)))
        own = [pair for pair in pairs if pair[0] in joinable and pair[1] in joinable]
        merges += [(-piece.score, vocabulary[left], vocabulary[right], left, right) for left, right in own]
    return [(left, right) for *_, left, right in sorted(merges)]


def _blanks() -> list[Any]:
    return [normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)]


def _normalizer(spec: Any) -> Any:
    """What SentencePiece does to a piece of text before it is split."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    blanks = _blanks()
    return normalizers.Sequence([*steps, *(blanks if spec.add_dummy_prefix else blanks[1:])])


def _add_tokens(tokenizer: Tokenizer, pieces: Any, checkpoint: Checkpoint) -> None:
    """Special pieces of the model, and what was added to it later."""
    own = [
        AddedToken(piece.piece, special=piece.type != _USER_DEFINED, normalized=False)
        for piece in pieces
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    later = {
        id_: AddedToken(name, special=True, normalized=False) for name, id_ in named_ids(checkpoint).items()
    }
    later |= described_tokens(checkpoint, normalized=False)
    in_order = [later[id_] for id_ in sorted(later)]
    tokenizer.add_tokens([*own, *in_order])  # at once: every call looks through all that there are
    for id_, token in later.items():
        if tokenizer.token_to_id(token.content) != id_:
            raise CheckpointError(
                f"has pieces up to id {len(pieces) - 1}, and {named(token.content)} is to have the id {id_}",
                subject=str(checkpoint.folder / MODEL),
                hint="tokenizer.model and added_tokens.json or tokenizer_config.json do not belong together",
            )


def _add_ends(tokenizer: Tokenizer, trained: Any, checkpoint: Checkpoint) -> None:
    """Special tokens around every text, as Llama's tokenizer has them: one at the beginning where nothing else is said."""
    begin = trained.bos_piece if truth(checkpoint, "add_bos_token", True) else ""
    end = trained.eos_piece if truth(checkpoint, "add_eos_token", False) else ""
    names = [name for name in (begin, end) if name and tokenizer.token_to_id(name) is not None]
    if names:
        single = " ".join([*names[: bool(begin)], "$A", *names[bool(begin) :]])
        ids = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
