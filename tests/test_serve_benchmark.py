"""The serving benchmark and the soak without a model: loops over a stub of a server, what they come to, verdicts."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import serve_model
import serve_results
import serve_simulation
import serve_soak
import serve_soak_asks
import serve_soak_clients
from serve_clients import Answered, Loaded, ask, closed_loop, open_loop
from serve_model import PRUNED, UNPRUNED
from serve_results import Point

TRUTH = serve_soak_asks.Truth("a red box", 4, "stop")
ERROR = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "c"}}).encode()
STUB_S = 0.002


def event(**choice: Any) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}]}, separators=(',', ':'))}\n\n".encode()


def chunked(*parts: bytes, whole: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n" * whole
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def stream(*texts: str, reason: str = "stop", tokens: int = 4, done: bool = True) -> list[bytes]:
    usage = {"choices": [], "usage": {"completion_tokens": tokens}, "himap": {"timing": {"prefill_s": 0.5}}}
    pieces = [event(delta={"content": text}, finish_reason=None) for text in texts]
    role = event(delta={"role": "assistant", "content": ""}, finish_reason=None)
    end = [event(delta={}, finish_reason=reason), f"data: {json.dumps(usage)}\n\n".encode()]
    return [role, *pieces, *end, *([b"data: [DONE]\n\n"] if done else [])]


def plain(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def with_stub(answer: bytes, client: Callable[[int], Awaitable[Any]]) -> tuple[Any, int]:
    """What `client` returns of a server that gives everybody the same answer; and how many asked."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(size)
        await asyncio.sleep(STUB_S)
        writer.write(answer)
        writer.close()

    async def run() -> Any:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await client(server.sockets[0].getsockname()[1])

    return asyncio.run(run()), asked


def test_one_answer_is_timed_piece_by_piece_and_counted_by_the_server() -> None:
    found, _ = with_stub(chunked(*stream("a", " red", " box")), lambda port: ask(port, b"{}"))
    assert (found.status, found.tokens, len(found.pieces)) == (200, 4, 3) and found.timing == {"prefill_s": 0.5}
    assert found.due <= found.pieces[0] <= found.pieces[-1] <= found.ended
    refused, _ = with_stub(plain(429, ERROR), lambda port: ask(port, b"{}"))
    assert (refused.status, refused.pieces) == (429, ())


def test_a_closed_loop_counts_what_was_due_in_its_window() -> None:
    answer = chunked(*stream("a"))
    loaded, asked = with_stub(answer, lambda port: closed_loop(port, [b"1", b"22"], 3, 0.05, settled=5))
    assert loaded.rate > 0 and 4 <= len(loaded.answers) <= asked - 5
    assert {answer.status for answer in loaded.answers} == {200}


def test_an_open_loop_asks_when_it_is_time_whoever_waits() -> None:
    def once(port: int) -> Awaitable[Loaded]:
        return open_loop(port, [b"{}"], 400, 0.1, seed=3)

    first, again = (with_stub(chunked(*stream("a")), once)[0] for _ in range(2))
    gaps = [np.diff([answer.due for answer in loaded.answers]) for loaded in (first, again)]
    assert len(first.answers) > 20
    np.testing.assert_allclose(*gaps, atol=1e-9)  # the same arrivals


def answered(first: float, between: float, whole: float, tokens: int = 3) -> Answered:
    pieces = tuple(10 + first + between * n for n in range(tokens))
    timing = {"prefill_s": first, "decode_s": between * (tokens - 1)}
    return Answered(10, pieces, 10 + whole, 200, tokens=tokens, timing=timing)


def point(plan: str, rates: tuple[float, ...], first: float = 0.1, load: str = "1 client") -> Point:
    answers = tuple(answered(first * n, 0.02, 1.0) for n in range(1, 4))
    return Point(load, plan, 3, tuple(Loaded(rate, answers) for rate in rates))


def test_a_point_gathers_its_rounds() -> None:
    row = dict(zip(serve_results.HEAD, point(PRUNED, (4.0, 2.0, 3.0)).row(), strict=True))
    assert row["requests/s"] == "3.00 (2.00 to 4.00)" and row["answers"] == "9" and row["refused"] == "0"
    assert row["TTFT p50 / p95 / p99, ms"].startswith("200 / 300")
    assert row["between tokens p50 / p95 / p99, ms"] == "20 / 20 / 20"
    json.dumps(point(PRUNED, (4.0,)).document())
    assert row["load"] in serve_results.table(serve_results.HEAD, [tuple(row.values())])


def test_an_answer_that_is_too_short_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match=r"answers of \[2\] tokens, not 3"):
        Point("1 client", PRUNED, 3, (Loaded(1.0, (answered(0.1, 0.02, 1.0, tokens=2),)),))


def test_gates_compare_the_plans_round_by_round() -> None:
    closed = {
        (16, 1, PRUNED): point(PRUNED, (2.0, 3.0)), (16, 1, UNPRUNED): point(UNPRUNED, (1.0, 4.0), first=0.3),
        (16, 32, PRUNED): point(PRUNED, (3.0, 3.0)), (16, 32, UNPRUNED): point(UNPRUNED, (2.0, 2.0)),
    }  # fmt: skip
    alone, loaded = serve_results.gates(closed)
    assert alone.line().startswith("met      1.38x") and alone.bar == 1
    assert loaded.line().startswith("NOT MET  1.50x") and loaded.bar == serve_results.FASTER
    first, second = serve_results.comparisons(closed, 8, 2.0)
    assert "1.38x as many requests/s (0.75 to 2.00); its times of one client allow" in first
    assert second.startswith("16 tokens, 32 clients") and second.endswith("FLOPs allow 2.00x of prefill")


def test_costs_promise_what_slots_can_do() -> None:
    costs = serve_results.Costs(prefill=0.2, step=0.05)
    assert costs.rate(1, 8, 16) == pytest.approx(1 / (0.2 + 15 * 0.05))
    assert costs.rate(4, 8, 16) == pytest.approx(4 / (0.8 + 15 * 0.05))
    assert costs.rate(32, 8, 16) == costs.rate(8, 8, 16) > costs.rate(4, 8, 16)
    alone = serve_results.Costs.of(point(PRUNED, (1.0,)))
    assert (alone.prefill, alone.step) == (pytest.approx(0.2), pytest.approx(0.02))


COSTS = serve_simulation.Costs("test", 2, 1.0, prefill_rows=1.5, step=0.1, step_rows=0.2)


def test_simulated_ways_by_hand() -> None:
    arrivals, lengths = np.zeros(3), np.array([2, 6, 2])
    alone = serve_simulation.alone(arrivals, lengths, COSTS)
    assert alone.first == pytest.approx([1, 2.1, 3.6]) and alone.end == pytest.approx(3.7)
    static = serve_simulation.static(arrivals, lengths, COSTS)
    assert static.first == pytest.approx([1.5, 1.5, 4.0]) and static.whole == pytest.approx([1.7, 2.5, 4.2])
    slots = serve_simulation.slots(arrivals, lengths, COSTS)  # the third begins while the second goes on
    assert slots.first == pytest.approx([1.0, 2.2, 3.4]) and slots.whole == pytest.approx([1.2, 4.2, 3.6])
    together = serve_simulation.slots(arrivals, lengths, COSTS, prefills=2)
    assert together.first[:2] == pytest.approx([1.0, 2.0])


def test_a_simulation_says_whose_costs_it_has() -> None:
    said, rows = serve_simulation.simulated(serve_simulation.ASSUMED[0], 64, count=60)
    assert said.startswith("simulated, a GPU, costs assumed, 8 rows") and len(rows) == 9
    assert {len(row) for row in rows} == {len(serve_simulation.HEAD)}


def test_questions_have_as_many_words_as_tokens_are_wanted() -> None:
    (body,) = serve_model.bodies("m:himap", 16, ["data:,"], count=1)
    text = json.loads(body)["messages"][0]["content"][1]["text"]
    assert len(text.split()) == serve_model.AFTER and text == serve_model.question(0)
    assert serve_model.pictures(1)[0].startswith("data:image/png;base64,")


def test_responses_are_read_as_they_are_framed() -> None:
    assert serve_soak_clients.received(plain(404, b"abc")) == serve_soak_clients.Received(404, b"abc", True)
    assert serve_soak_clients.received(plain(404, b"abc")[:-1]).whole is False
    assert serve_soak_clients.received(chunked(b"ab", b"c")) == serve_soak_clients.Received(200, b"abc", True)
    assert serve_soak_clients.received(chunked(b"ab", whole=False)).whole is False
    assert serve_soak_clients.received(b"") == serve_soak_clients.Received(0, b"", False)


def whole(text: str, reason: str = "stop", tokens: int = 4) -> bytes:
    choice = {"message": {"content": text}, "finish_reason": reason}
    return plain(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode())


@pytest.mark.parametrize(
    ("raw", "streamed", "kind"),
    [
        (whole("a red box"), False, "right"),
        (whole("a blue box"), False, "wrong"),
        (whole("a red box", reason="length"), False, "wrong"),
        (whole("a red box", tokens=3), False, "wrong"),
        (whole("a red box")[:-3], False, "lost"),
        (chunked(*stream("a", " red", " box")), True, "right"),
        (chunked(*stream("a", " red")), True, "wrong"),
        (chunked(*stream("a", " red", " box", done=False)), True, "lost"),
        (chunked(*stream("a", " red", " box"), whole=False), True, "lost"),
        (plain(429, ERROR), True, "error"),
        (plain(500, b"Internal Server Error"), True, "lost"),
        (b"", False, "lost"),
    ],
)
def test_every_response_is_right_wrong_an_error_or_lost(raw: bytes, streamed: bool, kind: str) -> None:
    assert serve_soak_clients.judged("whole", raw, TRUTH, streamed).kind == kind


def test_a_stream_that_was_left_must_begin_the_answer() -> None:
    half, other = stream("a", " re"), stream("a", " bl")
    assert serve_soak_clients.left("leaves", chunked(*half[:3], whole=False), TRUTH).kind == "left"
    assert serve_soak_clients.left("leaves", chunked(*other[:3], whole=False), TRUTH).kind == "wrong"
    assert serve_soak_clients.left("leaves", b"", TRUTH).kind == "left"


def test_a_malformed_request_must_have_its_own_status() -> None:
    ask = serve_soak_asks.Ask("dart", 0, "what is it?", 3, 0.0, seed=0)
    wrong = serve_soak_asks.malformed(ask.body([("image/png", b"x")], "shapes", stream=False))
    assert len({w.name for w in wrong}) == len(wrong) >= 20
    assert all(w.content.count(b"\r\n\r\n") >= 1 for w in wrong)
    got = serve_soak_clients.received(plain(400, ERROR))
    assert serve_soak_clients.refused("malformed", got, 400).kind == "error"
    assert serve_soak_clients.refused("malformed", got, 404).kind == "lost"


def soak(*outcomes: serve_soak_clients.Outcome) -> serve_soak.Soak:
    return serve_soak.Soak(serve_soak_clients.Door(0), [], [], [], 0, list(outcomes))


@pytest.mark.parametrize("count", [50, 1500, 10_000])
def test_as_many_requests_are_planned_as_were_asked_for(count: int) -> None:
    planned = Counter(soak().plan(count))
    bursts = planned.pop("burst", 0)
    assert planned.total() + bursts * serve_soak.BURST == count and (bursts > 0) == (count >= 3 * serve_soak.BURST)


def test_verdicts_fail_for_what_they_name() -> None:
    outcome = serve_soak_clients.Outcome
    samples = serve_soak.Samples([0, 3, 0], [8, 8, 0], [(0.15, 100), (0.95, 104), (1.0, 104)])
    good = soak(outcome("whole", "right", 200), outcome("burst", "error", 429), outcome("leaves", "left"))
    assert [c.what for c in serve_soak.checks(good, samples, True, 3) if not c.holds] == []
    bad = soak(outcome("whole", "wrong", 200), outcome("slow", "lost"), outcome("whole", "error", 503))
    leak = serve_soak.Samples([33, 0, 1], [8, 8, 1], [(0.15, 100), (0.95, 110), (1.0, 110)])
    assert len([c for c in serve_soak.checks(bad, leak, False, 4) if not c.holds]) == 8
