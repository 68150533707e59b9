"""`bench/serve.py`: what its clients notice, and how its figures are made."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Serving = Callable[[str], ModuleType]
Answer = Callable[[int], bytes]
"""Number of a request -> what is sent back; nothing closes the connection."""


@pytest.fixture
def serving(script: Callable[[str], ModuleType]) -> Serving:
    """`serving("load")`: a module of `bench/serving`."""
    return lambda name: script(f"serving.{name}")


@pytest.fixture
def asked(serving: Serving) -> ModuleType:
    return serving("asked")


def http(body: Any, status: int = 200, *lines: str) -> bytes:
    content = json.dumps(body).encode()
    head = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(content)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


def grounded(text: str, box: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4), kept: int = 36) -> dict[str, Any]:
    edges = dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True))
    keep = {"used": 0.25, "tokens": kept}
    return {"expression": "the red circle", "raw": text, "boxes": [edges], "keep": keep}


class Last(bytes):
    """What a server says before it ends the connection."""


def with_server(answer: Answer, ask: Callable[[int], Awaitable[Any]]) -> Any:
    """Run a client beside a server that says what it is told to."""

    async def run() -> Any:
        count = iter(range(1000))

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except (EOFError, OSError):
                    return writer.close()
                (length,) = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
                await reader.readexactly(int(length.split(b":")[1]))
                said = answer(next(count))
                writer.write(said)
                if not said or isinstance(said, Last):
                    return writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await ask(server.sockets[0].getsockname()[1])

    return asyncio.run(run())


@pytest.fixture
def load_of(serving: Serving, asked: ModuleType) -> Callable[..., Any]:
    """`load_of(answer, requests=1, **manners)`: the tally of one client that makes so many requests."""
    load = serving("load")

    def ran(answer: Answer, requests: int = 1, **manners: Any) -> Any:
        one = asked.Request("ground", 0, asked.Shown(None, "data:,"), ("the red circle",))
        said = (asked.Said("a", ((0.1, 0.2, 0.3, 0.4),), 36),)

        async def ask(port: int) -> Any:
            clients = load.Load(port, [one], lambda request, used: said, load.Manners(**manners))
            await clients.run(1, 60.0, requests)
            return clients.tally

        return with_server(answer, ask)

    return ran


def test_a_right_answer_is_counted(load_of: Callable[..., Any]) -> None:
    tally = load_of(lambda _: http({"results": [grounded("a")]}), 3)
    assert (tally.answered, tally.wrong, tally.lost) == (Counter({(0, 0.25): 3}), [], [])


@pytest.mark.parametrize(
    "answer",
    [
        http({"results": [grounded("b")]}),
        http({"results": [grounded("a", (0.1, 0.2, 0.3, 0.5))]}),
        http({"results": [grounded("a", kept=35)]}),
        http({"results": []}),
        http({}),
        http({}, 500),
        http({"error": {"code": "queue_full"}}, 503),
    ],
    ids=["text", "box", "tokens", "none", "another body", "500", "a refusal without a time"],
)
def test_a_wrong_answer_is_noticed(load_of: Callable[..., Any], answer: bytes) -> None:
    tally = load_of(lambda _: answer)
    assert (len(tally.wrong), tally.lost) == (1, [])


def test_a_connection_that_ends_is_a_loss_or_is_asked_again(load_of: Callable[..., Any]) -> None:
    right = http({"results": [grounded("a")]})
    tally = load_of(lambda number: right if number else b"")
    assert (len(tally.lost), tally.total) == (1, 0)
    tally = load_of(lambda number: right if number else Last(right[:-5]))
    assert (len(tally.lost), tally.total) == (1, 0)
    tally = load_of(lambda number: right if number else b"", again=True)
    assert (tally.lost, tally.broken, tally.total) == ([], 1, 1)


def test_who_is_refused_asks_again_after_that_time(load_of: Callable[..., Any]) -> None:
    refusal = http({"error": {"code": "queue_full"}}, 503, "Retry-After: 0")
    tally = load_of(lambda number: refusal if number < 2 else http({"results": [grounded("a")]}))
    assert (tally.refused, tally.total, tally.wrong) == (2, 1, [])


def test_clients_end_when_the_server_stops(load_of: Callable[..., Any]) -> None:
    refusal = http({"error": {"code": "draining"}}, 503, "Retry-After: 5")
    tally = load_of(lambda _: refusal, 5, until_draining=True)
    assert (tally.refused, tally.total) == (1, 0)


def test_streams_are_read_in_chunks(serving: Serving, asked: ModuleType) -> None:
    ours = {"boxes": [], "keep": {"used": 0.5, "tokens": 72}}
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "[0."}}]},
        {"choices": [{"delta": {"content": "1]"}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "gap": ours},
        {"choices": [], "usage": {}},
    ]
    lines = [*map(json.dumps, events), "[DONE]"]
    chunks = [f"data: {line}\n\n".encode() for line in lines]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    wire = serving("wire")

    async def ask(port: int) -> Any:
        seen: list[bytes] = []
        reply = await wire.Connection(port).ask(wire.request_bytes("POST", "/", {}), seen.append)
        return reply, seen

    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    reply, seen = with_server(lambda _: answer, ask)
    assert seen == chunks
    request = asked.Request("stream", 0, asked.Shown(None, ""), ("?",))
    assert asked.said_in(request, reply) == ((asked.Said("[0.1]", (), 72),), 0.5)
    cut = wire.Reply(200, {}, reply.body.replace(b"data: [DONE]\n\n", b""))
    with pytest.raises(ValueError, match="DONE"):
        asked.said_in(request, cut)


def test_the_mixture_has_every_kind_keep_and_length(asked: ModuleType) -> None:
    requests = asked.mixture(3)
    assert {request.kind for request in requests} == set(asked.KINDS)
    assert {request.keep for request in requests} == set(asked.KEEPS)
    words = {len(text.split()) for request in requests for text in request.texts if request.kind == "ground"}
    assert len(words) >= 3
    shares = Counter[str]()
    for request, weight in zip(requests, asked.weights(requests), strict=True):
        shares[request.kind] += weight  # type: ignore[assignment]
    assert dict(shares) == pytest.approx(asked.SHARES)
    assert all(json.loads(request.sent.partition(b"\r\n\r\n")[2]) == request.body for request in requests)


def test_the_bound_is_of_what_was_answered(serving: Serving) -> None:
    costs = serving("bound").Costs(
        rows=4,
        step=0.002,
        step_alone=0.001,
        read={(0, None): 0.005, (1, 0.5): 0.008},
        steps={(0, None): 10, (1, 0.5): 4},
        core_share=1.0,
        read_by_ground=0.004,
        read_by_engine=0.005,
    )
    assert costs.seconds((0, None)) == pytest.approx(0.01)
    assert costs.bound(Counter({(0, None): 3})) == pytest.approx(100)
    assert costs.bound(Counter({(0, None): 1, (1, 0.5): 1})) == pytest.approx(100)


def test_fractions_that_the_server_may_not_choose_are_wrong(serving: Serving, asked: ModuleType) -> None:
    said = (asked.Said("a", (), 1),)
    free = asked.Request("ground", 0, asked.Shown(None, ""), ("x",))
    own = asked.Request("ground", 0, asked.Shown(None, ""), ("x",), 0.5)
    answers = {(0, 0.25): said, (0, 1.0): said, (1, 0.5): said}
    known = serving("known").Known([free, own], answers, 0.25)
    assert (known(free, 0.25), known(free, None), known(free, 1.0)) == (said, said, ())
    assert (known(own, 0.5), known(own, 0.25)) == (said, ())
    chosen = serving("known").Known([free, own], answers, 0.25, (1.0, 0.25))
    assert (chosen(free, 1.0), chosen(own, 1.0)) == (said, ())


def test_growth_is_what_follows_the_warm_up(serving: Serving) -> None:
    memory = serving("part_memory")
    warming = [float(min(100, 5 * number)) for number in range(25)]
    assert memory.growth([*warming, *[100.0] * 75]) == 0
    assert memory.growth([*warming, *(100.0 + number for number in range(75))]) > 50
    assert memory.thinned(list(range(100)), 4) == [0, 33, 66, 99]


def test_percentiles(serving: Serving) -> None:
    percentile = serving("setup").percentile
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7.0], 0.99) == 7


def test_targets(serving: Serving) -> None:
    target = serving("setup").Target
    assert target("", 2.0, 2).met
    assert not target("", 2.1, 2).met
    assert target("", 0.85, 0.85, least=True).met
    assert not target("", 0.84, 0.85, least=True).met
    assert target("", None, 0.85, least=True).met


def test_metrics_are_read(serving: Serving) -> None:
    text = '# HELP a b\na_total 3.0\nb_bucket{le="+Inf"} 2.0\n'
    assert serving("wire").metric_values(text) == {"a_total": 3, 'b_bucket{le="+Inf"}': 2}


def test_what_aiperf_says_is_kept_in_short(serving: Serving) -> None:
    said = {"request_latency": {"unit": "ms", "avg": 1.23456, "p1": 1.0, "sum": 9.0}, "input_config": {}}
    assert serving("part_aiperf").figures_of(said) == {"request_latency": {"unit": "ms", "avg": 1.2346}}


def test_a_part_replaces_its_own_record_alone(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    serve, path = script("serve"), tmp_path / "serve.json"
    assert serve.recorded(path) == {}
    serve.store(path, {"load": {"ok": True}, "memory": {"ok": False}})
    parts = serve.recorded(path)
    assert parts == {"load": {"ok": True}, "memory": {"ok": False}}
    assert json.loads(path.read_text())["ok"] is False


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the folder are loaded anew by every test."""
    import sys

    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "serving"]:
        del sys.modules[name]
