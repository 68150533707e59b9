"""Conversations with a bundle: free questions, several turns, answers as a whole or as they are made.

    with load("out/llava") as model:
        chat = model.chat("photo.jpg", system="Answer in one word.")
        print(chat.ask("What is on the table?").text)
        for piece in chat.stream("What colour is it?"):
            print(piece, end="")

A session has one cache. Whoever asks next may take it: an answer that finds its conversation gone reads it again, images excepted.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export.boxes.codecs import Box
from gap_export.errors import InputError, SessionError
from gap_export.inputs.chat.conversation import Turn, check_conversation
from gap_export.inputs.chat.tokens import IMAGE, Prompt, Said
from gap_export.inputs.images import ImageSource, load_image
from gap_export.positions import Ids
from gap_export.runtime.answer.sampling import Sampling, choose
from gap_export.runtime.answer.text_stream import TextStream, check_stop
from gap_export.runtime.conversation.cache import ConversationCache, SeenImages, check_fits
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.generate import Timings, check_finite
from gap_export.runtime.session import Session

Images = ImageSource | Sequence[ImageSource] | None
"""Of one question: none, one, or several in their order."""


@dataclass(frozen=True)
class AskOptions:
    """How an answer is made.

    Attributes:
        sampling: how its tokens are chosen.
        stop: texts that end it and are not shown.
        max_new_tokens: its longest; the bundle's own where left out.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    @classmethod
    def of(
        cls,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        max_new_tokens: int | None = None,
    ) -> AskOptions:
        """Checked.

        Args:
            temperature: of sampling; 0 takes the likeliest token.
            top_p: smallest share of the probability that tokens are drawn from.
            top_k: how many of the likeliest tokens they are drawn from; 0 for all.
            min_p: smallest probability of a token, as a share of the likeliest one's.
            repetition_penalty: above 1, tokens that were seen become less likely.
            seed: of what is drawn.
            stop: texts that end the answer.
            max_new_tokens: its longest.

        Raises:
            InputError: one of them is out of range, or of another type.
        """
        if max_new_tokens is not None and (
            isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1
        ):
            raise InputError(
                "must be a whole number from 1 on",
                subject=f"max_new_tokens {max_new_tokens!r}",
                hint="ask for at least one token",
            )
        sampling = Sampling.of(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        return cls(sampling, check_stop([stop] if isinstance(stop, str) else stop), max_new_tokens)


def options_of(options: AskOptions | None, choices: Mapping[str, Any]) -> AskOptions:
    """How an answer is made, given as a whole or one by one.

    Args:
        options: as a whole.
        choices: arguments of `AskOptions.of`.

    Raises:
        InputError: both, a name that is none of them, or a value that cannot be used.
    """
    unknown = [name for name in choices if name not in signature(AskOptions.of).parameters]
    if unknown or (options is not None and choices):
        raise InputError(
            "is not known" if unknown else "stands beside options, which say it already",
            subject=(unknown or list(choices))[0],
            hint=f"known: {', '.join(signature(AskOptions.of).parameters)}",
        )
    return options or AskOptions.of(**choices)


@dataclass(frozen=True)
class Reply:
    """An answer to a free question.

    Attributes:
        text: as generated, without special tokens; up to the stop string, where one ended it.
        finish_reason: `stop` where the model or a stop string ended it, `length` where it was cut off at the longest length, `closed` where its
            reader ended it.
        ids: generated, the end token left out.
        prompt_tokens: text tokens of the conversation, earlier answers included.
        boxes: every box in the text, in its order: (x1, y1, x2, y2) in pixels of the conversation's last image as displayed.
        kept_indices: [K] int64 raster indices of the visual tokens of that image that entered the decoder; empty without one.
        visual_tokens: of that image, before pruning; 0 without one.
        notes: what the reader should know of how it was made, a sentence each.
        timings: of it.
    """

    text: str
    finish_reason: Literal["stop", "length", "closed"]
    ids: tuple[int, ...]
    prompt_tokens: int
    boxes: tuple[Box, ...]
    kept_indices: Ids
    visual_tokens: int
    notes: tuple[str, ...]
    timings: Timings

    @property
    def new_tokens(self) -> int:
        """How many were generated."""
        return len(self.ids)

    @property
    def box(self) -> Box | None:
        """The first box; None where there is none."""
        return self.boxes[0] if self.boxes else None


@dataclass
class _State:
    """What was said, and what was seen."""

    turns: list[Turn] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    seen: list[SeenImages] = field(default_factory=list)
    last_size: tuple[int, int] | None = None
    focus: str | None = None

    def copy(self) -> _State:
        return _State(list(self.turns), list(self.said), list(self.seen), self.last_size, self.focus)


class Chat:
    """One conversation. An answer that fails leaves it as it was.

    Args:
        prompts: of the bundle.
        session: of the bundle, or the reference of its checkpoint.
        images: that the first question is about, besides its own.
        system: what the system says; None for what the template says of itself.
        keep: fraction of the visual tokens to keep, in bundles that let requests choose.
        focus: text that pruners which read text go by, in place of the first question.

    Raises:
        InputError: an image, a text or a fraction that cannot be used.
    """

    def __init__(
        self,
        prompts: ChatPrompts,
        session: Session,
        *,
        images: Images = None,
        system: str | None = None,
        keep: float | None = None,
        focus: str | None = None,
    ) -> None:
        prompts.check_keep(keep)
        if focus is not None:
            prompts.check_reads_text()
        self._prompts, self._session, self._keep = prompts, session, keep
        self._state = _State(focus=focus)
        if system is not None:
            check_conversation([Turn("system", system), Turn("user", "?")])
            self._state.turns.append(Turn("system", system))
        self._first_images = _loaded(images)
        self._cache = ConversationCache(session, prompts.manifest)
        self._answering: weakref.ref[ReplyStream] | None = None

    def check_focus(self, focus: str) -> None:
        """Refuse a text that visual tokens cannot be chosen by, before a question is asked with it.

        Args:
            focus: as a question would be given it.

        Raises:
            InputError: the pruner reads no text, or cannot read this one.
        """
        self._prompts.check_reads_text()
        self._prompts.text_ids(focus, whole=True)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far, from the first turn on."""
        return tuple(self._state.turns)

    def ask(
        self,
        question: str,
        *,
        images: Images = None,
        focus: str | None = None,
        options: AskOptions | None = None,
        **choices: Any,
    ) -> Reply:
        """Ask, and wait for the whole answer.

        Args:
            question: of the user.
            images: that come with it.
            focus: text that pruners which read text choose visual tokens by from now on; images of before are encoded again.
            options: how the answer is made; greedy by default.
            choices: what these options have, one by one, see `AskOptions.of`.

        Raises:
            InputError: a question or an image that cannot be used, or a conversation that does not fit.
            SessionError: the runtime failed, is closed, or another answer of this conversation is still being read.
        """
        with self._session.turn():
            return self.stream(question, images=images, focus=focus, options=options, **choices).reply

    def stream(
        self,
        question: str,
        *,
        images: Images = None,
        focus: str | None = None,
        options: AskOptions | None = None,
        **choices: Any,
    ) -> ReplyStream:
        """Ask, and read the answer as it is made.

        Args:
            question: of the user.
            images: that come with it.
            focus: as of `ask`.
            options: how the answer is made; greedy by default.
            choices: what these options have, one by one, see `AskOptions.of`.

        Returns:
            an iterator over pieces of text. What is not read is not made, and the cache is free for other answers in between.

        Raises:
            InputError: a question or an image that cannot be used, or a conversation that does not fit.
            SessionError: the runtime failed, is closed, or another answer of this conversation is still being read.
        """
        if self._answering is not None:
            open_stream = self._answering()
            if open_stream is not None and not open_stream.ended:
                raise SessionError(
                    "is still being read",
                    subject="the last answer of this conversation",
                    hint="read it to its end, or close it",
                )
        began = time.perf_counter()
        options = options_of(options, choices)
        state = self._state.copy()
        loaded = [*(self._first_images if not self._state.said else []), *_loaded(images)]
        state.turns.append(Turn("user", question, len(loaded)))
        prompt = self._prompts.tokens.prompt(state.turns, state.said)
        notes = self._see(state, loaded, question, focus)
        longest = options.max_new_tokens or self._prompts.manifest.max_new_tokens
        check_fits(self._prompts.manifest, prompt.ids, state.seen, longest)
        stream = ReplyStream(self, state, prompt, options, longest, notes)
        stream._spend(preprocess=time.perf_counter() - began)
        self._answering = weakref.ref(stream)
        return stream

    def _see(
        self, state: _State, loaded: Sequence[Image.Image], question: str, focus: str | None
    ) -> tuple[str, ...]:
        """Prepare images of a question, and say what the pruner made of the text."""
        prompts, notes = self._prompts, []
        if focus is not None:
            prompts.check_reads_text()
            state.focus = focus
            text_ids = prompts.text_ids(focus, whole=True)
            state.seen = [SeenImages(each.batch, each.keep_counts, text_ids) for each in state.seen]
        elif state.seen and not loaded:
            notes += prompts.notes_of_later_turns()
        if loaded:
            whole = state.focus is not None
            text = question if state.focus is None else state.focus
            state.seen += prompts.seen_images(loaded, self._keep, prompts.text_ids(text, whole=whole))
            state.last_size = loaded[-1].size
        return tuple(notes)

    def _finish(
        self,
        stream: TextStream,
        state: _State,
        prompt: Prompt,
        ids: Sequence[int],
        text: str,
        *,
        cut: bool,
    ) -> Said:
        """Take an answer into the conversation.

        Returns:
            The answer; where it was cut, it ends where the shown text ends.
        """
        kept = list(ids)
        if cut:
            kept = list(stream.ids)
            if stream.remainder:
                before = text.removesuffix(stream.remainder)
                kept += self._prompts.tokens.continued(before, stream.remainder)
        said = Said(prompt.last, text, tuple(kept))
        state.said.append(said)
        state.turns.append(Turn("assistant", text))
        self._state = state
        return said


class ReplyStream(Iterator[str]):
    """An answer as it is made: an iterator over pieces of text, none of which holds half a character or the beginning of a stop string.

    Args:
        chat: that it is an answer in.
        state: of the conversation, the question included.
        prompt: ids of it.
        options: how it is made.
        longest: most tokens of it.
        notes: of it.
    """

    def __init__(
        self,
        chat: Chat,
        state: _State,
        prompt: Prompt,
        options: AskOptions,
        longest: int,
        notes: tuple[str, ...],
    ) -> None:
        self._chat, self._state, self._prompt = chat, state, prompt
        self._options, self._longest, self._notes = options, longest, notes
        self._text = TextStream(chat._prompts.tokenizer, options.stop)
        self._ids: list[int] = []
        self._reply: Reply | None = None
        self._failed = False
        self._timings = Timings()
        image = chat._prompts.manifest.prompt.image_token_id
        self._met = {image if id_ == IMAGE else id_ for id_ in prompt.ids}

    @property
    def ended(self) -> bool:
        """Whether there is no more to come."""
        return self._reply is not None or self._failed

    @property
    def reply(self) -> Reply:
        """The whole answer; what was not read of it is made now.

        Raises:
            SessionError: the runtime failed, or is closed.
        """
        for _ in self:
            continue
        if self._reply is None:
            raise SessionError(
                "failed, and has no answer", subject="the runtime", hint="ask again, or open the model again"
            )
        return self._reply

    def __next__(self) -> str:
        while not self.ended:
            piece = self._advance()
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the answer here: what was given of it is part of the conversation."""
        if not self.ended:
            self._end("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self) -> str:
        """Make one more token: the text that can be shown by now."""
        try:
            with self._chat._session.turn():  # the next call of the session overwrites its logits
                logits_V = self._logits()
                check_finite(logits_V, self._chat._session.backend)
                token = choose(logits_V, self._options.sampling, self._met, len(self._ids))
        except BaseException:
            self._failed = True
            raise
        if token in self._chat._prompts.end_token_ids:
            return self._end_with("stop")
        self._ids.append(token)
        self._met.add(token)
        piece = self._text.push(token)
        if self._text.stopped:
            self._end("stop")
        elif len(self._ids) == self._longest:
            piece += self._end_with("length")
        return piece

    def _logits(self) -> NDArray[np.float32]:
        """[V] float32 of the next token."""
        cache = self._chat._cache
        with self._chat._session.turn():
            began = time.perf_counter()
            if self._ids and not cache.lost:
                logits = cache.step(self._ids[-1])
                self._spend(decode=time.perf_counter() - began)
                return logits
            for each in self._state.seen:
                cache.encode(each)
            encoded = time.perf_counter()
            left = self._longest - len(self._ids)
            logits = cache.read(self._prompt.ids, self._state.seen, left, answered=self._ids)
            self._spend(vision=encoded - began, prefill=time.perf_counter() - encoded)
            return logits

    def _spend(
        self, *, preprocess: float = 0.0, vision: float = 0.0, prefill: float = 0.0, decode: float = 0.0
    ) -> None:
        spent = self._timings
        self._timings = Timings(
            spent.preprocess + preprocess,
            spent.vision + vision,
            spent.prefill + prefill,
            spent.decode + decode,
        )

    def _end_with(self, reason: Literal["stop", "length"]) -> str:
        """End the answer: the text that was held back."""
        rest = self._text.finish()
        self._end("stop" if self._text.stopped else reason)
        return rest

    def _end(self, reason: Literal["stop", "length", "closed"]) -> None:
        text, state, prompts = self._text.text, self._state, self._chat._prompts
        cut = self._text.stopped or reason == "closed"
        said = self._chat._finish(self._text, state, self._prompt, self._ids, text, cut=cut)
        seen = state.seen[-1] if state.seen else None
        size = state.last_size
        seen_of_last = [] if seen is None else seen.kept_indices()
        self._reply = Reply(
            text=text,
            finish_reason=reason,
            ids=said.ids,
            prompt_tokens=sum(id_ != IMAGE for id_ in self._prompt.ids),
            boxes=() if size is None else prompts.boxes_in(text, size),
            kept_indices=seen_of_last[-1] if seen_of_last else np.zeros(0, np.int64),
            visual_tokens=0 if seen is None else int(seen.batch.visual_tokens[-1]),
            notes=self._notes,
            timings=self._timings,
        )


def _loaded(images: Images) -> list[Image.Image]:
    """Of one question, in their order.

    Raises:
        InputError: one cannot be used.
    """
    if images is None:
        return []
    several: Sequence[ImageSource] = (
        images if isinstance(images, list | tuple) else [cast("ImageSource", images)]
    )
    return [load_image(each) for each in several]
