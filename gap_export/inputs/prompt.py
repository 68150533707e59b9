"""From an expression to token ids and from token ids to an answer, with the `tokenizers` library alone.

An expression is text from outside. A tokenizer turns text such as `<image>` or `</s>` into the token of that
name wherever it stands, so an expression could bring a second image placeholder or end the prompt. Such an
expression is refused, not escaped: escaping would change how the words around it are split, and no
description of an object needs the name of a special token. The check is made twice, on the text and on the
ids that come out of the tokenizer.

Shape letters: B batch, T tokens of the longest prompt, placeholder included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from gap_export.errors import BundleError, CheckpointError, InputError
from gap_export.inputs.tokenizer import tokenizer_errors
from gap_export.positions import PAD, Ids
from gap_export.records import Record, Text

SLOT = "{expression}"


class TextTower(Record):
    """What reads the expression inside the vision graph, for pruners that look at it: CLIP's text tower, or the decoder's own token embedding.

    Attributes:
        kind: which of them.
        checkpoint: folder or hub id that the tower's weights came from; None for embeddings, which are the checkpoint's own.
        context: most tokens of an expression, with CLIP those that begin and end it included. Short rows are filled: with CLIP with the token
            that ends them, at the first of which the tower reads its answer, otherwise with `PAD`.
        width: of the space shared by patches and text.
        vocabulary: rows of its token embedding.
        aligned_inversely: whether patches that match the text are less similar to it than others.
    """

    kind: Literal["clip", "embeddings"] = "clip"
    checkpoint: Text | None
    context: int = Field(ge=1)
    width: int
    vocabulary: int
    aligned_inversely: bool

    @classmethod
    def of_embeddings(cls, *, width: int, vocabulary: int, longest: int) -> TextTower:
        """The decoder's own token embedding.

        Args:
            width: of the decoder.
            vocabulary: rows of the embedding.
            longest: most tokens of an expression.
        """
        return cls(
            kind="embeddings",
            checkpoint=None,
            context=longest,
            width=width,
            vocabulary=vocabulary,
            aligned_inversely=False,
        )


class PromptTemplate(Record):
    """How an expression becomes token ids.

    Attributes:
        grounding: the whole prompt with `{expression}` and an image placeholder for every image.
        images: images in one prompt; boxes are those of the last one.
        image_token_id: the placeholder's id.
        add_special_tokens: whether the tokenizer adds its own (BOS) on top of the template.
        eos_token_ids: ids that end an answer.
    """

    grounding: str
    images: int = Field(default=1, ge=1)
    image_token_id: int
    add_special_tokens: bool
    eos_token_ids: tuple[int, ...]


class Prompts(NamedTuple):
    """A batch of tokenized prompts.

    Attributes:
        input_ids: [B, T] int64, I placeholders per row, short rows filled with `PAD` at the end.
        text_before: [B] int64, tokens before the first placeholder (T_pre).
        text_after: [B] int64, tokens after the last one (T_post).
        between: [B, I - 1] int64, tokens between one placeholder and the next.
    """

    input_ids: Ids
    text_before: Ids
    text_after: Ids
    between: Ids


def clean_expression(expression: str) -> str:
    """An expression with its white space reduced to single blanks.

    Raises:
        InputError: nothing visible in it, or characters that are not valid Unicode text.
    """
    try:
        expression.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "is not valid text", subject=_quoted(expression), hint="give the expression in UTF-8"
        ) from error
    words = " ".join(expression.split())
    if not any(character.isprintable() and character != " " for character in words):
        raise InputError(
            "is empty", subject="expression", hint="describe the object: 'the red mug on the left'"
        )
    hidden = sorted(
        {f"U+{ord(character):04X}" for character in words if ord(character) < 32 or ord(character) == 127}
    )
    if hidden:
        raise InputError(
            f"contains control characters ({', '.join(hidden)})", subject=_quoted(words), hint="remove them"
        )
    return words


def encode_prompts(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    expressions: Sequence[str],
    *,
    vocabulary: int,
    kept: int,
    capacity: int,
    max_new_tokens: int,
) -> Prompts:
    """Token ids of a batch of referring expressions.

    Args:
        tokenizer: from `load_tokenizer`.
        template: of the bundle.
        expressions: at least one.
        vocabulary: rows of the decoder's token embedding.
        kept: visual tokens of an image after pruning (K); they take its placeholder's place.
        capacity: slots of the cache.
        max_new_tokens: slots to leave free for the answer.

    Returns:
        Prompts that fit into the cache, with their visual tokens and answers.

    Raises:
        InputError: an expression that is empty, not text, names a special token, has a token that the model has no embedding of, or does
            not fit.
        BundleError: a template without exactly one `{expression}`, with another number of placeholders than it says, or with a token that
            the model has no embedding of.
        TypeError: a bare string for `expressions`, which would be taken letter by letter.
    """
    if isinstance(expressions, str):
        raise TypeError("expressions is a sequence of strings, not one string")
    if not expressions:
        raise ValueError("a batch needs at least one expression")
    fault = template_fault(tokenizer, template, vocabulary)
    if fault is not None:
        raise BundleError(
            fault, subject="prompt template", hint="build the bundle again from a recipe with a whole prompt"
        )
    guarded = _guarded_ids(tokenizer, template)
    empty, images = _encode(tokenizer, template, ""), template.images
    expected = _count(empty, guarded)
    fitting = capacity - images * kept - max_new_tokens

    rows = []
    for raw in expressions:
        expression = clean_expression(raw)
        _check_special_text(tokenizer, guarded, expression)
        row = _encode(tokenizer, template, expression)
        if _count(row, guarded) != expected:
            raise _names_special_token(expression, "a special token")
        _check_embedded(tokenizer, row, vocabulary, expression, apart_from=template.image_token_id)
        text_tokens = len(row) - images
        if text_tokens > fitting:
            fixed = len(empty) - images
            raise InputError(
                f"makes a prompt of {text_tokens} text tokens, and {max(fitting, 0)} fit: "
                f"capacity {capacity}, minus {images * kept} visual tokens, minus {max_new_tokens} for the answer",
                subject=_quoted(expression),
                hint=f"shorten the expression by {text_tokens - fitting} tokens, or build with a larger --max-text"
                if fixed < fitting
                else f"{fixed} of them are the prompt itself: build with a larger --max-text or --capacity, or keep fewer tokens",
            )
        rows.append(row)

    input_ids_BT = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for index, row in enumerate(rows):
        input_ids_BT[index, : len(row)] = row
    text_before, *between, text_after = text_lengths(input_ids_BT, template.image_token_id).T
    return Prompts(
        input_ids_BT, text_before, text_after, np.array(between, np.int64).reshape(-1, len(rows)).T
    )


def template_fault(tokenizer: Tokenizer, template: PromptTemplate, vocabulary: int) -> str | None:
    """What is wrong with a template: not exactly one `{expression}`, another number of placeholders than it has images, or a token that
    the model has no embedding of.

    Args:
        tokenizer: from `load_tokenizer`.
        template: to be asked.
        vocabulary: rows of the decoder's token embedding.

    Returns:
        a phrase, e.g. "gives 2 image placeholders instead of one"; None where all is well.
    """
    if template.grounding.count(SLOT) != 1:
        return f"has {template.grounding.count(SLOT)} times {SLOT} instead of once"
    ids = _encode(tokenizer, template, "")
    beyond = _not_embedded(tokenizer, ids, vocabulary, apart_from=template.image_token_id)
    if beyond is not None:
        return f"has {beyond}"
    found = ids.count(template.image_token_id)
    if found != template.images:
        wanted = "one" if template.images == 1 else str(template.images)
        return f"gives {found} image placeholders instead of {wanted}"
    return None


def text_lengths(input_ids_BT: Ids, image_token_id: int) -> Ids:
    """[B, I + 1] int64: how many text tokens stand before, between and after the I placeholders of every row."""
    rows = [row[row != PAD] for row in input_ids_BT]
    ends = [np.array([-1, *np.flatnonzero(row == image_token_id), len(row)], np.int64) for row in rows]
    return np.stack([np.diff(each) - 1 for each in ends])


def check_text_tokenizer(tokenizer: Tokenizer, tower: TextTower) -> None:
    """Refuse a text tower's tokenizer that does not say where an expression ends.

    Raises:
        CheckpointError: expressions do not end with one token of their own.
    """
    rows = [tokenizer.encode(word).ids for word in ("cat", "a dog")]
    ends = {row[-1] for row in rows if row}
    if len(ends) != 1 or any(row.count(row[-1]) != 1 for row in rows):
        raise CheckpointError(
            "does not end every expression with one token of its own",
            subject=f"{tower.checkpoint}, tokenizer.json",
            hint="save it with a post-processor that adds the tokens CLIP begins and ends texts with",
        )


def encode_text(tokenizer: Tokenizer, tower: TextTower, expressions: Sequence[str]) -> Ids:
    """Token ids of expressions for the text tower inside the vision graph.

    Args:
        tokenizer: of the text tower.
        tower: of the bundle.
        expressions: at least one.

    Returns:
        [B, L] int64, short rows filled with the token that ends them, or with `PAD` where nothing ends them.

    Raises:
        InputError: an expression that is empty, not text, names a special token, has a token that the tower has no embedding of, or is
            longer than the tower reads.
    """
    rows = []
    for raw in expressions:
        expression = clean_expression(raw)
        _check_special_text(tokenizer, set(), expression)
        row = list(tokenizer.encode(expression, add_special_tokens=tower.kind == "clip").ids)
        _check_embedded(tokenizer, row, tower.vocabulary, expression)
        if len(row) > tower.context:
            raise InputError(
                f"has {len(row)} tokens, and the pruner reads {tower.context}",
                subject=_quoted(expression),
                hint=f"shorten the expression by {len(row) - tower.context} tokens",
            )
        rows.append(row)
    longest = max(map(len, rows))
    fillers = [row[-1] if tower.kind == "clip" else PAD for row in rows]
    return np.array(
        [row + [filler] * (longest - len(row)) for row, filler in zip(rows, fillers, strict=True)], np.int64
    )


def encode_prose(tokenizer: Tokenizer, content: str, vocabulary: int, *, subject: str) -> list[int]:
    """Token ids of a text that the decoder reads as it stands, with what the tokenizer adds of its own.

    Args:
        tokenizer: from `load_tokenizer`.
        content: of any length; names of special tokens in it become those.
        vocabulary: rows of the decoder's token embedding.
        subject: where the text is from, for the message.

    Raises:
        InputError: it has a token that the model has no embedding of.
    """
    with tokenizer_errors(subject, "cannot be split into tokens"):
        ids: list[int] = tokenizer.encode(content, add_special_tokens=True).ids
    beyond = _not_embedded(tokenizer, ids, vocabulary)
    if beyond is not None:
        raise InputError(
            f"has {beyond}", subject=subject, hint="give a text without the names of special tokens"
        )
    return ids


def unknown_words(tokenizer: Tokenizer, expression: str) -> tuple[str, ...]:
    """Parts of an expression that the tokenizer has no token for, in order, each once.

    A model asked about a word that it never saw still answers with a box, so callers should say so.
    Tokenizers that fall back to bytes know every word.
    """
    unknown = _unknown_id(tokenizer)
    text = clean_expression(expression)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = (text[a:b] for (a, b), id_ in zip(encoding.offsets, encoding.ids, strict=True) if id_ == unknown)
    return tuple(dict.fromkeys(spans))


def decode_answer(tokenizer: Tokenizer, ids: Iterable[int], eos_token_ids: Collection[int] = ()) -> str:
    """Text of one generated answer.

    The answer ends before the first of `eos_token_ids` and before the first negative id (padding of a batch).
    Special tokens at its end are dropped; inside it they stay visible, so that a broken answer is not read as
    a sound one.

    Args:
        tokenizer: from `load_tokenizer`.
        ids: generated token ids of one row.
        eos_token_ids: of the bundle's template.

    Returns:
        The text without surrounding white space; empty if nothing was generated.
    """
    answer: list[int] = []
    for id_ in map(int, ids):
        if id_ < 0 or id_ in eos_token_ids:
            break
        answer.append(id_)
    special = _special_ids(tokenizer)
    while answer and answer[-1] in special:
        answer.pop()
    return tokenizer.decode(answer, skip_special_tokens=False).strip()


# ------------------------------------------------------------------------------------------------------------
# Special tokens


def _encode(tokenizer: Tokenizer, template: PromptTemplate, expression: str) -> list[int]:
    text = template.grounding.replace(SLOT, expression)
    return list(tokenizer.encode(text, add_special_tokens=template.add_special_tokens).ids)


def _not_embedded(
    tokenizer: Tokenizer, ids: Sequence[int], vocabulary: int, *, apart_from: int | None = None
) -> str | None:
    """The first token that lies outside the embedding, in words; None where there is none. Nothing looks up a placeholder."""
    for id_ in ids:
        if id_ >= vocabulary and id_ != apart_from:
            name = _quoted_text(tokenizer.id_to_token(id_) or "")
            return f"the token {id_} ({name}), and the model has an embedding of {vocabulary} tokens"
    return None


def _check_embedded(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    vocabulary: int,
    expression: str,
    *,
    apart_from: int | None = None,
) -> None:
    beyond = _not_embedded(tokenizer, ids, vocabulary, apart_from=apart_from)
    if beyond is not None:
        raise InputError(
            f"has {beyond}",
            subject=_quoted(expression),
            hint="use other words: tokenizer and model do not belong together",
        )


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    token = getattr(tokenizer.model, "unk_token", None) or "<unk>"
    return tokenizer.token_to_id(token)


def _guarded_ids(tokenizer: Tokenizer, template: PromptTemplate) -> set[int]:
    """Ids an expression must not bring. The unknown token is not among them: an unknown word is no attack."""
    return (_special_ids(tokenizer) | {template.image_token_id, *template.eos_token_ids}) - {
        _unknown_id(tokenizer)
    }


def _count(ids: list[int], guarded: set[int]) -> Counter[int]:
    return Counter(id_ for id_ in ids if id_ in guarded)


def _check_special_text(tokenizer: Tokenizer, guarded: set[int], expression: str) -> None:
    """Refuse the name of a special token in any case, `<unk>` too: a normaliser may fold the case before
    matching."""
    folded = expression.casefold()
    for id_ in guarded | _special_ids(tokenizer):
        name = tokenizer.id_to_token(id_)
        if name and name.casefold() in folded:
            raise _names_special_token(expression, repr(name))


def _names_special_token(expression: str, name: str) -> InputError:
    return InputError(
        f"contains {name}, which the tokenizer reads as a control token and not as words",
        subject=_quoted(expression),
        hint="describe the object in plain words",
    )


def _quoted(expression: str) -> str:
    """An expression as the subject of a message: printable and short."""
    return f"expression {_quoted_text(expression)}"


def _quoted_text(text: str) -> str:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return ascii(shown) if not shown.isprintable() else repr(shown)
