"""One answer on its way: read into a row, made token by token, and what is said of it at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gap_export.inputs.chat.tokens import IMAGE
from gap_export.inputs.prompt import decode_answer
from gap_export.positions import Placement
from gap_export.runtime.answer.sampling import choose
from gap_export.runtime.answer.text_stream import TextStream
from gap_export.runtime.conversation.cache import ConversationCache, SeenImages
from gap_export.runtime.conversation.context import Mark, text_placement
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.generate import check_finite
from gap_export.runtime.model import Model
from gap_export.serving.lanes import Row
from gap_export.serving.placing import placement_fault
from gap_export.serving.preparing import Prepared, Prompted
from gap_export.serving.work import Conversation, Result, Spent, Ticket, Trace


class Answering:
    """Begins answers of one model.

    Args:
        model: loaded.

    Attributes:
        prompts: for free questions; None where the bundle answers none.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._manifest = model, model.bundle.manifest
        self.prompts: ChatPrompts | None = model.prompts if self._manifest.chat is not None else None

    def begin(
        self,
        ticket: Ticket,
        prepared: Prepared,
        prompted: Prompted,
        cache: ConversationCache,
        row: Row,
        seen: Sequence[SeenImages],
        keep: float | None,
    ) -> tuple[Answer, NDArray[np.float32]]:
        """Read a question into a row.

        Args:
            ticket: of its request.
            prepared: the request.
            prompted: the question.
            cache: of the row, with whatever lies in it.
            row: that it is read into.
            seen: its images.
            keep: fraction that they are pruned to; None for the bundle's own.

        Returns:
            The answer, of which nothing is made yet, and [V] float32 logits of its first token, overwritten by the next call of the session.

        Raises:
            SessionError: the runtime failed.
        """
        began, now = time.perf_counter(), time.monotonic()
        row.perturb = ticket.work.perturb
        for each in seen:
            cache.encode(each)
        encoded = time.perf_counter()
        logits_V = cache.read(prompted.ids, seen, prompted.longest)
        spent = Spent(
            queue=max(0.0, now - ticket.admitted - prepared.seconds),
            decode_image=prepared.seconds,
            vision=encoded - began,
            prefill=time.perf_counter() - encoded,
        )
        answer = Answer(self._model, ticket, prepared, prompted, cache, row, seen, keep, spent)
        if ticket.work.trace:
            answer.first_logits = logits_V.copy()
        return answer, logits_V

    def placement(self, answers: Sequence[Answer]) -> Placement:
        """Where the next token of every row is fed.

        Args:
            answers: of the rows, in their order.

        Returns:
            `position_ids` [B, 1] (M-RoPE [3, B, 1]).
        """
        rows = self._manifest.spec.position_rows
        positions_B = np.array([answer.fed_position for answer in answers], np.int64)
        slots_SB = np.array([answer.mark.slots for answer in answers], np.int64).T
        shape = (len(answers), 1) if rows == 1 else (rows, len(answers), 1)
        return Placement(
            position_ids=np.array(np.broadcast_to(positions_B[:, None], shape)),
            write_index=slots_SB[0],
            last_index=np.zeros(len(answers), np.int64),
            next_position=positions_B + 1,
            next_slot=slots_SB[0] + 1,
            image_slots=answers[0].cache.image_slots,
            stage_write_index=tuple(slots_SB[1:]),
            stage_next_slot=tuple(slots_SB[1:] + 1),
        )


class Answer:
    """An answer in a row.

    Attributes:
        number: of its question.
        cache: of the row.
        row: the row.
        seen: images of the question.
        ids: tokens so far.
        mark: where the next token is fed.
        first_logits: [V] float32 of the first token, where answers say what they were computed from; nothing otherwise.
        ended: whether there is no more to come.
    """

    def __init__(
        self,
        model: Model,
        ticket: Ticket,
        prepared: Prepared,
        prompted: Prompted,
        cache: ConversationCache,
        row: Row,
        seen: Sequence[SeenImages],
        keep: float | None,
        spent: Spent,
    ) -> None:
        self._model, self._ticket, self._prepared, self._prompted = model, ticket, prepared, prompted
        self.seen, self._keep, self._spent = seen, keep, spent
        self._decode_seconds, self._last_token = 0.0, time.perf_counter()
        self.number, self.cache, self.row = prompted.number, cache, row
        self.first_logits, self.ended = np.zeros(0, np.float32), False
        self.ids: list[int] = []
        self._prompt_end: Mark = cache.context.end
        self._is_free = isinstance(prompted.question, Conversation)
        # Of a question for a box that is not listened to, the text is wanted at its end alone.
        self._text: TextStream | None = None
        if self._is_free or ticket.listened_to:
            stop = ticket.work.options.stop if self._is_free else ()
            self._text = TextStream(model.grounder.tokenizer, stop)
        self._stopped = False
        image = model.bundle.manifest.prompt.image_token_id
        self._met = {image if id_ == IMAGE else id_ for id_ in prompted.ids}
        self._ends = model.bundle.manifest.prompt.eos_token_ids

    @property
    def mark(self) -> Mark:
        """Where the last token is fed."""
        count = len(self.ids) - 1
        end = self._prompt_end
        return Mark(end.position + count, tuple(slot + count for slot in end.slots))

    @property
    def fed_position(self) -> int:
        """Position id of the last token, as it is fed: another one than that of its mark in checks that a wrong one shows."""
        if self.row.perturb is None:
            return self._prompt_end.position + len(self.ids) - 1
        rows = self._model.bundle.manifest.spec.position_rows
        placement = text_placement(self.mark, 1, rows, self.cache.image_slots)
        return int(self.row.perturb(placement).position_ids.flat[0])

    @property
    def slot(self) -> int:
        """Slots in use, in the first stage."""
        return self._prompt_end.slots[0] + len(self.ids)

    def fed(self, seconds: float, now: float) -> float:
        """A token of the row was fed.

        Args:
            seconds: that the call took.
            now: `time.perf_counter()`.

        Returns:
            Seconds since there was a token of this answer before.
        """
        self._decode_seconds += seconds
        interval, self._last_token = now - self._last_token, now
        return interval

    def take(self, logits_V: NDArray[np.float32]) -> str:
        """Choose the next token.

        Args:
            logits_V: [V] float32.

        Returns:
            Text that can be shown by now.

        Raises:
            SessionError: the logits are not numbers.
        """
        check_finite(logits_V, self._model.session.backend)
        options = self._ticket.work.options
        token = choose(logits_V, options.sampling, self._met, len(self.ids))
        if token in self._ends:
            self._stopped = self.ended = True
            return "" if self._text is None else self._text.finish()
        self.ids.append(token)
        self._met.add(token)
        is_last = len(self.ids) == self._prompted.longest
        if self._text is None:
            self.ended = is_last
            return ""
        piece = self._text.push(token)
        if is_last and not self._text.stopped:
            piece += self._text.finish()
        self._stopped = self._text.stopped
        self.ended = is_last or self._stopped
        return piece

    def result(self) -> Result:
        """The whole answer, when it has ended."""
        grounder, manifest = self._model.grounder, self._model.bundle.manifest
        sizes = self._prepared.sizes
        size = sizes[-1] if sizes else None
        if self._is_free and self._text is not None:
            text = self._text.text
        else:
            text = decode_answer(grounder.tokenizer, self.ids)
        kept = [indices for each in self.seen for indices in each.kept_indices()]
        visual = sum(int(count) for batch in self._prepared.batches for count in batch.visual_tokens)
        keep = self._keep if self._keep is not None else manifest.pruning.keep
        spent = replace(
            self._spent, decode=self._decode_seconds, total=time.monotonic() - self._ticket.admitted
        )
        return Result(
            text=text,
            ids=tuple(self.ids),
            finish_reason="stop" if self._stopped else "length",
            boxes=() if size is None else grounder.boxes_in(text, size),
            keep=keep if sizes else None,
            kept=sum(map(len, kept)),
            visual_tokens=visual,
            kept_indices=self._left(kept),
            prompt_tokens=sum(id_ != IMAGE for id_ in self._prompted.ids),
            image_size=size,
            spent=spent,
            trace=self._trace(kept) if self._ticket.work.trace else None,
        )

    def _left(self, kept: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """[K] raster indices of the last image that are left at the end of the decoder.

        Args:
            kept: of every image, what entered it.
        """
        if self.row.left and kept:
            left_K: NDArray[np.int64] = self.row.left[-1][0]
            return left_K[left_K >= 0]
        return kept[-1] if kept else np.zeros(0, np.int64)

    def _trace(self, kept: Sequence[NDArray[np.int64]]) -> Trace:
        end, ids = self._prompt_end, self._prompted.ids
        lengths = text_lengths(ids)
        fed = self.row.fed[:, : end.slots[0]].copy()
        follows = len(lengths) > 1 and lengths[-1] > 0
        trace = Trace(
            kept_indices=tuple(kept),
            position_ids=fed,
            first_text_position=int(fed[0, -lengths[-1]]) if follows else None,
            next_position=end.position,
            next_slot=end.slots[0],
            text_lengths=lengths,
            first_logits=self.first_logits,
        )
        pruning = self._model.bundle.manifest.pruning
        return replace(trace, fault=placement_fault(pruning, self._prepared.batches, trace))


def text_lengths(ids: Sequence[int]) -> tuple[int, ...]:
    """Text tokens before, between and after the images of a prompt.

    Args:
        ids: of it, `IMAGE` for every image.
    """
    places = [-1, *(place for place, id_ in enumerate(ids) if id_ == IMAGE), len(ids)]
    return tuple(after - before - 1 for before, after in pairwise(places))
