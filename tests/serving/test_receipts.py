"""Receipts: whoever has the bundle and the image can compute an answer again, and a server that renumbers is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gap_export.boxes.scenes import cases
from gap_export.bundle.folder import Bundle
from gap_export.bundle.golden import renumbered
from gap_export.cli import app
from gap_export.errors import BundleError, InputError
from gap_export.inputs.chat.conversation import Turn
from gap_export.positions import Placement
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.runtime.model import Model, load
from gap_export.runtime.ort import OnnxRuntimeSession
from gap_export.serving.check_receipt import ReceiptCheck, check_receipt
from gap_export.serving.engine import Engine
from gap_export.serving.limits import EngineLimits
from gap_export.serving.receipts import Receipt, digest_of, image_digest, read_receipt, receipt_of
from gap_export.serving.work import Conversation, Expression, Question, Result, Work
from tests.serving.test_ready import ids_alone, splices

BuildBundle = Callable[..., Bundle]


@dataclass(frozen=True)
class Answered:
    """A bundle, an image, and the receipt of an answer about it."""

    bundle: Bundle
    image: Image.Image
    receipt: Receipt

    def check(
        self, receipt: Any = None, image: Any = None, expression: str | None = None, messages: Any = None
    ) -> ReceiptCheck:
        return check_receipt(
            self.bundle,
            self.receipt if receipt is None else receipt,
            image or self.image,
            expression,
            messages=messages,
            threads=1,
        )


def answered(
    bundle: Bundle,
    *questions: Question,
    image: Image.Image | None = None,
    wrong: Callable[[Model], Any] | None = None,
    keep: float | None = None,
    **options: Any,
) -> list[Answered]:
    """Receipts of a server, one for every question about one image."""
    image = image or next(iter(cases(1))).image
    work = Work(questions, lambda: [image], 1, keep=keep, options=AskOptions.of(**options), trace=True)
    with load(bundle, threads=1) as model:
        if wrong is not None:
            wrong(model)
        engine = Engine(model, EngineLimits(rows=4))
        outcomes = engine.submit(work).result()
        engine.close()
    receipts = []
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Result), outcome
        receipt = receipt_of(bundle, work, number, [image_digest(image)], outcome, keep)
        receipts.append(Answered(bundle, image, receipt))
    return receipts


@pytest.fixture(scope="module")
def one(tiny_bundle: BuildBundle) -> Answered:
    """An answer of the tiny bundle."""
    (found,) = answered(tiny_bundle(), Expression("the red mug"))
    return found


def found(check: ReceiptCheck, name: str) -> Any:
    (line,) = (line for line in check.lines if line.name == name)
    return line


# What agrees


def test_receipts_of_a_right_server_agree(shapes_bundle: Bundle) -> None:
    talk = Conversation((Turn("user", "where is the red circle?", 1),))
    first, second, free = answered(
        shapes_bundle, Expression("the red circle"), Expression("the small blue square"), talk, keep=0.5
    )
    for each in (first, second):
        check = each.check()
        assert check.agrees, check.contradicted
        assert all(line.agrees for line in check.lines), "something was not told"
        assert each.receipt.boxes
    assert (first.receipt.keep_asked, first.receipt.keep_used, first.receipt.kept) == (0.5, 0.5, 72)
    assert free.receipt.expression is None
    assert "where is" not in free.receipt.model_dump_json(), "the conversation is told"
    check = free.check(messages=SENT)
    assert check.agrees, check.contradicted
    assert all(line.agrees for line in check.lines), "something was not told"


SENT = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": ""}},
            {"type": "text", "text": "where is the red circle?"},
        ],
    }
]
"""Messages of a conversation, its image left out."""
FREE = Conversation((Turn("user", "where is the red circle?", 1),))
UNTOLD_OF_CONVERSATIONS = ("conversation", "text lengths", "sampling", "tokens", "finish reason")


@pytest.fixture(scope="module")
def free(shapes_bundle: Bundle) -> Answered:
    """A greedy answer in a conversation."""
    (each,) = answered(shapes_bundle, FREE)
    return each


def test_without_its_conversation_a_receipt_is_not_checked(free: Answered) -> None:
    check = free.check()
    assert check.agrees is None
    assert (check.contradicted, check.unchecked) == ((), UNTOLD_OF_CONVERSATIONS)
    assert found(check, "position ids").agrees
    assert "--messages" in found(check, "conversation").said


def forgeries(receipt: Receipt) -> dict[str, dict[str, Any]]:
    """What might be written into a receipt, each consistent in itself."""
    ids = receipt.token_ids[:-1]
    return {
        "tokens": {"token_ids": ids, "answer": ""},
        "answer": {"answer": "nothing is there"},
        "boxes": {"boxes": ((1.0, 2.0, 3.0, 4.0),)},
        "conversation": {"conversation_sha256": "0" * 64},
        "text lengths": {"text_lengths": (receipt.text_lengths[0] + 1, *receipt.text_lengths[1:])},
        "finish reason": {"finish_reason": "length" if receipt.finish_reason == "stop" else "stop"},
    }


@pytest.mark.parametrize(
    "forged", ["tokens", "answer", "boxes", "conversation", "text lengths", "finish reason"]
)
def test_a_forged_answer_in_a_conversation_is_noticed(forged: str, free: Answered) -> None:
    wrong = sealed(free.receipt.model_copy(update=forgeries(free.receipt)[forged]))
    assert forged in free.check(wrong, messages=SENT).contradicted
    assert not free.check(wrong).agrees, "without its messages"


def test_a_whole_answer_that_was_made_up_is_noticed(free: Answered, shapes_bundle: Bundle) -> None:
    """Tokens, text and boxes of another answer of the same bundle, under this conversation's digest."""
    (other,) = answered(shapes_bundle, Conversation((Turn("user", "where is the blue square?", 1),)))
    fields = ("token_ids", "answer", "boxes", "finish_reason")
    wrong = sealed(free.receipt.model_copy(update={name: getattr(other.receipt, name) for name in fields}))
    assert other.receipt.token_ids != free.receipt.token_ids
    assert free.check(wrong, messages=SENT).contradicted == ("tokens",)
    assert free.check(wrong).agrees is None


@pytest.mark.long
def test_forged_sampling_of_a_conversation_is_noticed(free: Answered, shapes_bundle: Bundle) -> None:
    (drawn,) = answered(shapes_bundle, FREE, temperature=3.0, seed=7, max_new_tokens=4)
    right = {"messages": SENT, "temperature": 3.0, "seed": 7, "max_tokens": 4}
    assert drawn.check(messages=SENT).agrees
    assert drawn.check(messages=right).agrees
    sampling = drawn.receipt.sampling.model_copy(update={"seed": 8})
    other = sealed(drawn.receipt.model_copy(update={"sampling": sampling}))
    assert "tokens" in drawn.check(other, messages=SENT).contradicted
    # Of a greedy answer nothing depends on the seed: the body that was sent tells it all the same.
    sampling = free.receipt.sampling.model_copy(update={"seed": 8})
    other = sealed(free.receipt.model_copy(update={"sampling": sampling}))
    assert free.check(other, messages={"messages": SENT}).contradicted == ("sampling",)
    for field, name in (
        ({"max_tokens": 5}, "longest answer"),
        ({"stop": "zzz"}, "stop texts"),
        ({"gap": {"keep": 0.5}}, "keep of the request"),
    ):
        assert free.check(messages={"messages": SENT, **field}).contradicted == (name,)


@pytest.mark.long
def test_other_messages_are_another_conversation(one: Answered, free: Answered, tmp_path: Path) -> None:
    other = [{"role": "user", "content": [SENT[0]["content"][0], {"type": "text", "text": "and?"}]}]  # type: ignore[index]
    assert "conversation" in free.check(messages=other).contradicted
    assert "conversation" in one.check(messages=SENT).contradicted
    no_image = [{"role": "user", "content": "where is the red circle?"}]
    assert {"conversation", "computed again"} <= set(free.check(messages=no_image).contradicted)
    (tmp_path / "sent.json").write_text(json.dumps({"model": "shapes", "messages": SENT}))
    assert free.check(messages=tmp_path / "sent.json").agrees


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (3, "messages: must be a list"),
        ([], "messages: must have at least 1"),
        ({}, "messages: is missing"),
        ([{"role": "nobody", "content": "x"}], "messages[0].role: must be"),
        ({"messages": SENT, "answer": 1}, "answer: is not a field here"),
        ([{"role": "assistant", "content": "x"}], "the user"),
    ],
)
def test_what_are_no_messages(messages: Any, words: str, free: Answered) -> None:
    with pytest.raises(InputError) as caught:
        free.check(messages=messages)
    assert words in str(caught.value)
    with pytest.raises(InputError, match="both"):
        free.check(expression="the red circle", messages=SENT)


def test_answers_that_were_drawn_are_drawn_again(tiny_bundle: BuildBundle) -> None:
    (drawn,) = answered(
        tiny_bundle(), Expression("the red mug"), temperature=2.0, seed=7, top_p=0.9, max_new_tokens=3
    )
    assert drawn.check().agrees
    other = drawn.receipt.model_copy(
        update={"sampling": drawn.receipt.sampling.model_copy(update={"seed": 8})}
    )
    assert "tokens" in drawn.check(sealed(other)).contradicted


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [{"pruner": "trim"}, {"pruner": "prumerge", "keep": "adaptive"}, {"precision": "fp16"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_receipts_of_other_bundles_agree(changes: dict[str, Any], tiny_bundle: BuildBundle) -> None:
    (each,) = answered(tiny_bundle(**changes), Expression("the red mug"))
    check = each.check()
    assert check.agrees, check.contradicted


def test_a_baseline_says_so(tiny_bundle: BuildBundle) -> None:
    (each,) = answered(tiny_bundle(positions="shifted"), Expression("the red mug"))
    check = each.check()
    assert check.agrees
    assert found(check, "baseline").said == "position ids are shifted on purpose, not those of gap"
    assert each.receipt.next_position == each.receipt.next_slot


def test_receipts_of_several_sources(one: Answered, tmp_path: Path) -> None:
    one.receipt.write(tmp_path / "receipt.json")
    one.image.save(tmp_path / "image.png")
    content = json.loads((tmp_path / "receipt.json").read_text())
    assert read_receipt(content) == read_receipt(tmp_path / "receipt.json") == one.receipt
    for receipt in (content, tmp_path / "receipt.json", str(tmp_path / "receipt.json")):
        assert check_receipt(
            one.bundle.folder, receipt, [tmp_path / "image.png"], "the red mug", threads=1
        ).agrees


# What does not


def sealed(receipt: Receipt) -> Receipt:
    """With the digest of its fields as they are."""
    return receipt.model_copy(update={"receipt_sha256": receipt.own_sha256})


def one_digit_changed(value: Any) -> Iterator[Any]:
    """Every value that differs in one digit or character at one place, one for each thing that it holds."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield value / 2 if value else 0.5
    elif isinstance(value, str) and value:
        yield ("0" if value[0] != "0" else "1") + value[1:]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: changed} for changed in one_digit_changed(inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from (
                [*value[:place], changed, *value[place + 1 :]] for changed in one_digit_changed(inner)
            )


UNTOLD = {
    "gap_export": "said by whoever answered",
    "sampling": "nothing of a greedy answer depends on the rest of it",
}
"""Fields that a receipt with a right digest may say anything in."""


def refused_or_caught(answer: Answered, content: dict[str, Any]) -> str:
    """What is said of a receipt that is not right."""
    try:
        check = answer.check(content)
    except InputError as error:
        return error.message
    return "" if check.agrees else ", ".join(check.contradicted)


def test_one_digit_changed_in_any_field_is_caught(one: Answered) -> None:
    content = json.loads(one.receipt.model_dump_json())
    content["boxes"] = [[1.0, 2.0, 3.0, 4.0]]
    changes = 0
    for field, value in content.items():
        for changed in one_digit_changed(value):
            changes += 1
            wrong = json.loads(one.receipt.model_dump_json()) | {field: changed}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("gap_export.serving.check_receipt._Check.computed", lambda *_: None)
                assert refused_or_caught(one, wrong), field  # by its own digest alone
    assert changes > 40


def test_one_digit_changed_by_somebody_who_knows_the_digest_is_caught(one: Answered) -> None:
    content = json.loads(one.receipt.model_dump_json())
    untold = set()
    for field, value in content.items():
        if field == "receipt_sha256":
            continue
        changed = next(one_digit_changed(value), None)
        if changed is None:
            continue
        try:
            receipt = sealed(read_receipt({**content, field: changed}))
        except InputError:
            continue
        check = one.check(receipt)
        assert "receipt" not in check.contradicted
        if check.agrees:
            untold.add(field)
    assert untold <= set(UNTOLD), untold


def test_a_server_that_renumbers_is_caught(shapes_bundle: Bundle, tiny_bundle: BuildBundle) -> None:
    for bundle, expression in ((shapes_bundle, "the red circle"), (tiny_bundle(), "the red mug")):
        (each,) = answered(bundle, Expression(expression), wrong=splices(ids_alone))
        check = each.check()
        assert "receipt" not in check.contradicted, "its digests are consistent"
        assert {"position ids", "first text position"} <= set(check.contradicted)
        assert found(check, "position ids").said == "the receipt's are renumbered: they count the slots"
        assert found(check, "ids of this bundle").agrees


def test_a_bundle_that_renumbers_in_the_same_way_does_not_hide_it(
    tiny_bundle: BuildBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's session and the one that checks give the same wrong ids; the arithmetic does not."""
    splice = OnnxRuntimeSession.splice

    def renumbers(session: OnnxRuntimeSession, *arguments: Any) -> Any:
        spliced = splice(session, *arguments)
        return replace(spliced, placement=ids_alone(spliced.placement))

    monkeypatch.setattr(OnnxRuntimeSession, "splice", renumbers)
    (each,) = answered(tiny_bundle(), Expression("the red mug"))
    check = each.check()
    assert set(check.contradicted) == {"ids of this bundle", "position ids", "first text position"}
    assert "follow from the tokens that were kept" in found(check, "ids of this bundle").said


def test_a_bundle_that_renumbers_throughout_gives_no_answer_to_compare(
    one: Answered, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = OnnxRuntimeSession.splice

    def renumbers(session: OnnxRuntimeSession, *arguments: Any) -> Any:
        spliced = splice(session, *arguments)
        return replace(spliced, placement=renumbered(spliced.placement))

    monkeypatch.setattr(OnnxRuntimeSession, "splice", renumbers)
    check = one.check()
    assert check.contradicted == ("computed again",)
    assert "ends at position" in found(check, "computed again").said


def test_one_id_off_is_caught(tiny_bundle: BuildBundle) -> None:
    def off(placement: Placement) -> Placement:
        ids = placement.position_ids.copy()
        ids[..., 5] += 1
        return replace(placement, position_ids=ids)

    (each,) = answered(tiny_bundle(), Expression("the red mug"), wrong=splices(off))
    assert "position ids" in each.check().contradicted


@pytest.mark.long
def test_another_image_question_or_bundle(one: Answered, tiny_bundle: BuildBundle) -> None:
    almost = np.asarray(one.image).copy()
    almost[0, 0, 0] ^= 1
    assert "image, pixels" in one.check(image=Image.fromarray(almost)).contradicted
    wide = one.image.resize((97, 96))
    assert {"image, size", "image, pixels"} <= set(one.check(image=wide).contradicted)
    assert "number of images" in one.check(image=[one.image, one.image]).contradicted
    check = check_receipt(one.bundle, one.receipt, threads=1)
    assert {"number of images", "computed again"} <= set(check.contradicted)
    assert "expression" in one.check(expression="a cat").contradicted
    other = check_receipt(tiny_bundle(pruner="divprune"), one.receipt, one.image, threads=1)
    assert {"manifest", "graphs", "pruner", "kept indices"} <= set(other.contradicted)


def test_weights_that_were_changed_are_no_bundle(one: Answered, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one.bundle.folder, tmp_path / "bundle"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(BundleError, match="does not have the hash"):
        check_receipt(folder, one.receipt, one.image)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_lengths": [10**12, 1]}, "text lengths"),
        ({"token_ids": [10**15]}, "tokens"),
        ({"keep_asked": 0.5, "keep_used": 0.5}, "keep used"),
        ({"keep_asked": 0.5}, "keep asked"),
        ({"box_format": "no such"}, "box format"),
        ({"expression": None}, "question"),
        ({"conversation_sha256": "0" * 64}, "question"),
        ({"expression": ""}, "computed again"),
        ({"expression": "mug " * 500}, "computed again"),
        ({"max_new_tokens": 10**6}, "computed again"),
        ({"text_lengths": [3]}, "text lengths"),
        ({"images": []}, "number of images"),
        ({"graphs": {}}, "graphs"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_receipts_that_say_what_cannot_be(change: dict[str, Any], words: str, one: Answered) -> None:
    content = {**json.loads(one.receipt.model_dump_json()), **change}
    check = one.check(sealed(read_receipt(content)))
    assert words in check.contradicted
    assert all(line.said.isprintable() and len(line.said) < 900 for line in check.lines)


def test_a_conversation_cannot_ask_for_more_than_fits(shapes_bundle: Bundle) -> None:
    (free,) = answered(shapes_bundle, Conversation((Turn("user", "where is the red circle?", 1),)))
    for lengths in ((10**12, 1), (3,), (1, 1, 1)):
        wrong = sealed(free.receipt.model_copy(update={"text_lengths": lengths}))
        assert "text lengths" in free.check(wrong).contradicted


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 5000, b"{}",
        b'{"schema_version": 2}', b'{"keep_asked": NaN}', b'{"next_slot": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_receipt(content: bytes, one: Answered, tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_bytes(content)
    with pytest.raises(InputError, match=r"receipt\.json: cannot be read") as caught:
        one.check(tmp_path / "receipt.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("source", [None, 3, ["a"], {"next_slot": object()}, Path("nowhere.json")])
def test_what_is_no_source_of_a_receipt(source: Any, one: Answered) -> None:
    with pytest.raises(InputError) as caught:
        read_receipt(source)
    assert caught.value.hint


def test_digests_tell_shapes_and_order_apart() -> None:
    ids = np.arange(6, dtype=np.int64)
    same = digest_of([ids]), digest_of([ids.astype(">i8")]), digest_of([ids.astype(np.int32)])
    assert len(set(same)) == 1
    others = [[ids[::-1]], [ids.reshape(2, 3)], [ids[:3], ids[3:]], [ids, ids[:0]], []]
    assert len({digest_of(each) for each in others} | set(same)) == len(others) + 1


def test_an_answer_without_a_trace_has_no_receipt(one: Answered) -> None:
    work = Work((Expression("x"),), list, 1)
    result = Result("", (), "stop", (), None, 0, 0, np.zeros(0, np.int64), 0, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trace"):
        receipt_of(one.bundle, work, 0, [], result, None)


# The command


def test_the_command_tells_by_its_code(one: Answered, tmp_path: Path) -> None:
    one.receipt.write(tmp_path / "receipt.json")
    one.image.save(tmp_path / "image.png")
    arguments = [str(one.bundle.folder), str(tmp_path / "receipt.json"), str(tmp_path / "image.png")]

    def command(*further: str) -> Any:
        return CliRunner().invoke(app, ["check-receipt", *arguments, *further])

    right = command("--refer", "the red mug", "--threads", "1")
    assert right.exit_code == 0, right.output
    assert "position ids" in right.output
    assert "the receipt agrees with the bundle and the image" in right.output
    record = json.loads(command("--json").output)
    assert record["agrees"]
    assert {line["agrees"] for line in record["lines"]} == {True}
    wrong = command("--refer", "a cat")
    assert wrong.exit_code == 1
    assert "differs   expression: the receipt says 'the red mug', and it is 'a cat'" in wrong.output
    assert json.loads(command("--refer", "a cat", "--json").output)["agrees"] is False
    arguments[1] = str(tmp_path / "nowhere.json")
    assert isinstance(command().exception, InputError), "which the entry point turns into exit code 2"


def test_the_command_tells_what_it_could_not_check(free: Answered, tmp_path: Path) -> None:
    free.receipt.write(tmp_path / "receipt.json")
    free.image.save(tmp_path / "image.png")
    (tmp_path / "sent.json").write_text(json.dumps(SENT))
    names = ("receipt.json", "image.png")
    arguments = [str(free.bundle.folder), *(str(tmp_path / name) for name in names), "--threads", "1"]
    without = CliRunner().invoke(app, ["check-receipt", *arguments])
    assert without.exit_code == 1
    assert f"the receipt could not be checked: {', '.join(UNTOLD_OF_CONVERSATIONS)}" in without.output
    assert "give the messages that were sent (--messages)" in without.output
    record = json.loads(CliRunner().invoke(app, ["check-receipt", *arguments, "--json"]).output)
    assert (record["agrees"], record["unchecked"]) == (None, list(UNTOLD_OF_CONVERSATIONS))
    arguments += ["--messages", str(tmp_path / "sent.json")]
    right = CliRunner().invoke(app, ["check-receipt", *arguments])
    assert right.exit_code == 0, right.output
