"""The tokenizer of a checkpoint, in the form that bundles keep, with a placeholder for the image where it has none."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.added_tokens import described_tokens
from gap_export.checkpoint.sentencepiece import MODEL, begin_every_piece, read_sentencepiece
from gap_export.errors import CheckpointError, named
from gap_export.files import is_file
from gap_export.inputs.tokenizer import load_tokenizer, tokenizer_errors

TOKENIZER = "tokenizer.json"
_PAIR = ("vocab.json", "merges.txt")


def stored_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that lies in a checkpoint's folder.

    Raises:
        CheckpointError: none there, damaged, or in a form that cannot be converted here.
    """
    folder = checkpoint.folder
    if os.path.lexists(folder / TOKENIZER):
        tokenizer = load_tokenizer(folder / TOKENIZER)
        with tokenizer_errors(str(folder / TOKENIZER)):
            return _with_described(tokenizer, checkpoint)
    if not os.path.lexists(folder / MODEL):
        raise _missing(folder)
    return read_sentencepiece(checkpoint) or _converted(folder)


def slow_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint whose authors use transformers' slow one; see `sentencepiece.py`.

    Raises:
        CheckpointError: none there, damaged, or in a form that cannot be converted here.
    """
    with tokenizer_errors(str(checkpoint.folder)):
        return begin_every_piece(stored_tokenizer(checkpoint))


def with_placeholder(tokenizer: Tokenizer, name: str, id_: int) -> Tokenizer:
    """The tokenizer with a token for the image added.

    Args:
        tokenizer: changed in place.
        name: of the placeholder in the prompt.
        id_: that the model knows it by, or the first one it has no row for.

    Raises:
        CheckpointError: the tokenizer gives it another id.
    """
    with tokenizer_errors(TOKENIZER):
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    given = tokenizer.token_to_id(name)
    if given != id_:
        raise CheckpointError(
            f"gives {name} the id {given} where {id_} is needed",
            subject=TOKENIZER,
            hint="use the tokenizer that the checkpoint was published with",
        )
    return tokenizer


def check_placeholder(
    tokenizer: Tokenizer, name: str, id_: int, *, prompt: str, checkpoint: Checkpoint
) -> None:
    """Refuse a tokenizer that does not make the image's placeholder what config.json says it is.

    Args:
        tokenizer: of the prompt.
        name: that the placeholder has in the family's checkpoints; a prompt may use another one.
        id_: that config.json gives it.
        prompt: to be asked.
        checkpoint: that both come from, for messages.

    Raises:
        CheckpointError: names the token, and both ids where they differ.
    """
    added = tokenizer.get_added_tokens_decoder()
    if id_ in added and added[id_].content in prompt:
        return
    own = tokenizer.token_to_id(name)
    held = tokenizer.id_to_token(id_)
    if own == id_ and id_ in added:
        return  # the prompt is at fault, which is told where it is encoded
    if own is None:
        message = f"has no token {name}, which config.json gives the id {id_}"
    elif own != id_:
        message = f"gives {name} the id {own}, config.json gives it {id_}"
    else:
        message = f"has {name} (id {id_}) as a word that text is split into, not as an added token"
    if own != id_ and held is not None:
        message += f" ({held!r} in this tokenizer)"
    raise CheckpointError(
        f"the tokenizer {message}",
        subject=str(checkpoint.folder / TOKENIZER),
        hint="use the tokenizer that the checkpoint was published with, not that of its base model, or correct the image token's id in "
        "config.json",
    )


def check_in_vocabulary(
    tokenizer: Tokenizer, image_token_id: int, vocabulary: int, checkpoint: Checkpoint
) -> None:
    """Refuse a tokenizer that gives words ids for which the model has no embedding.

    Tokens that were added may have such ids: original LLaVA's placeholder is none of the model's, and no prompt has others.

    Args:
        tokenizer: of the prompt.
        image_token_id: of the placeholder; it is the model's own where config.json names it.
        vocabulary: rows of the embedding.
        checkpoint: that both come from, for messages.

    Raises:
        CheckpointError: names the token.
    """
    added = tokenizer.get_added_tokens_decoder()
    beyond = [
        (id_, word)
        for word, id_ in tokenizer.get_vocab(with_added_tokens=False).items()
        if id_ >= vocabulary and id_ not in added
    ]
    if beyond:
        id_, word = min(beyond)
        raise CheckpointError(
            f"gives {named(word)} the id {id_}, and the model has embeddings up to {vocabulary - 1} (vocab_size)",
            subject=str(checkpoint.folder / TOKENIZER),
            hint="use the tokenizer that the checkpoint was published with",
        )
    named_in = [name for name in ("image_token_index", "image_token_id") if name in checkpoint.config]
    if named_in and image_token_id >= vocabulary:
        raise CheckpointError(
            f"{named_in[0]} is {image_token_id}, and the vocabulary ends at {vocabulary - 1} (vocab_size)",
            subject=str(checkpoint.folder / "config.json"),
            hint="compare it with the model as published",
        )


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a token.

    Raises:
        CheckpointError: the tokenizer does not have it.
    """
    id_: int | None = tokenizer.token_to_id(name)
    if id_ is None:
        raise CheckpointError(
            f"has no token {name}",
            subject=TOKENIZER,
            hint="use the tokenizer that the checkpoint was published with, not that of its base model",
        )
    return id_


def _with_described(tokenizer: Tokenizer, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer with its added tokens as tokenizer_config.json describes them, where it does: transformers adds what is missing or different."""
    stored = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [token for token in described_tokens(checkpoint).values() if repr(token) not in stored]
    )
    return tokenizer


def _missing(folder: Path) -> CheckpointError:
    """The error of a folder without a tokenizer that can be read."""
    slow = all(is_file(folder / name) for name in _PAIR)
    return CheckpointError(
        f"has {' and '.join(_PAIR)}, and no {TOKENIZER}"
        if slow
        else f"has no tokenizer ({TOKENIZER} or {MODEL})",
        subject=str(folder),
        hint=f"save it in the other form: transformers' AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        if slow
        else f"download the checkpoint's {TOKENIZER}",
    )


def _converted(folder: Path) -> Tokenizer:
    """SentencePiece to `tokenizers`, by transformers' own converter."""
    from transformers import AutoTokenizer

    try:
        with tokenizer_errors(str(folder / MODEL)):
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
            assert isinstance(found, Tokenizer)
            return found
    except CheckpointError as error:  # whatever is missing or damaged, the advice is the same
        raise CheckpointError(
            f"has only {MODEL}, which could not be converted to {TOKENIZER}",
            subject=str(folder),
            hint="pip install sentencepiece protobuf, or save the tokenizer with transformers' save_pretrained",
        ) from error
