"""Questions over HTTP, as OpenAI's own client and curl ask them; each answer is what a session alone gives."""

import http.client
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from commands import QUESTIONS_64
from served import JSON, KEY, QUESTION, Served, data_uri, question

from himap_export.engines.bundle import Bundle

ASKED = [json.loads(line) for line in QUESTIONS_64.read_text().splitlines()]
IMAGES = QUESTIONS_64.parent


@pytest.fixture(scope="module")
def client(door: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{door.url}/v1", api_key=KEY, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def alone(shapes: Bundle) -> dict[tuple[str, str], str]:
    """What a session answers to each question, by plan."""
    found = {}
    for plan in ("qa", "none"):
        with shapes.session(plan=plan, threads=1) as session:
            for asked in ASKED:
                found[plan, asked["question"]] = session.ask(IMAGES / asked["image"], asked["question"]).text
    return found


@pytest.mark.parametrize("plan", ["qa", "none"])
def test_the_openai_client_gets_what_a_session_answers(
    client: openai.OpenAI, alone: dict[tuple[str, str], str], plan: str
) -> None:
    def ask(asked: dict[str, str]) -> openai.types.chat.ChatCompletion:
        body = question(asked["question"], data_uri((IMAGES / asked["image"]).read_bytes()), f"shapes:{plan}")
        return client.chat.completions.create(**body)

    with ThreadPoolExecutor(len(ASKED)) as pool:  # all at once: more than there are slots
        answers = list(pool.map(ask, ASKED))
    assert [a.choices[0].message.content for a in answers] == [alone[plan, asked["question"]] for asked in ASKED]
    assert answers[0].choices[0].message.content == "C" and answers[0].choices[0].finish_reason == "stop"
    assert answers[0].model == f"shapes:{plan}" and answers[0].id.startswith("chatcmpl-")
    usage = answers[0].usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 2 and usage.prompt_tokens > 64
    kept = {"qa": {"prefix": 64, "k1": 32, "k2": 8}, "none": {"prefix": 64}}[plan]
    assert usage.model_extra == {"image_tokens_kept": kept}


def test_the_openai_client_streams(client: openai.OpenAI, alone: dict[tuple[str, str], str]) -> None:
    asked = ASKED[2]
    body = question(asked["question"], data_uri((IMAGES / asked["image"]).read_bytes()))
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == alone["qa", asked["question"]]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_models_are_listed_with_their_plans(client: openai.OpenAI, door: Served) -> None:
    assert [model.id for model in client.models.list()] == ["shapes", "shapes:qa", "shapes:none", "shapes:himap"]
    pruned, unpruned = (client.models.retrieve(f"shapes:{plan}").model_extra for plan in ("qa", "none"))
    assert pruned == {
        "himap": {
            "plan": "qa",
            "cuts": [{"layer": 2, "criterion": "instruction"}, {"layer": 8, "criterion": "image"}],
            "image_tokens": {"prefix": 64, "k1": 32, "k2": 8},
            "picture": [112, 112],
            "images": [1],
            "max_new_tokens": 12,
        }
    }
    assert unpruned is not None and unpruned["himap"]["cuts"] == []
    with pytest.raises(openai.NotFoundError, match="there is no model") as found:
        client.models.retrieve("shapez")
    assert found.value.code == "model_not_found" and "did you mean shapes?" in str(found.value)


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, door: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").chat.completions.create(**question())
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**question(model="gpt-4o"))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="n is not supported: leave it out, or give 1") as asked:
        client.chat.completions.create(**question(), n=2)
    assert (asked.value.code, asked.value.param, asked.value.type) == (
        "unsupported_value",
        "n",
        "invalid_request_error",
    )
    assert asked.value.request_id == door.lines()[-1]["request_id"]


def test_curl_asks_whole_and_streamed(door: Served) -> None:
    def curl(**more: object) -> str:
        command = ["curl", "-sS", "-N", f"{door.url}/v1/chat/completions", "-H", "content-type: application/json"]
        command += ["-H", f"authorization: Bearer {KEY}", "--data-binary", "@-"]
        body = json.dumps(question(**more))  # type: ignore[arg-type]
        return subprocess.run(command, input=body, capture_output=True, text=True, check=True, timeout=30).stdout

    assert json.loads(curl())["choices"][0]["message"]["content"] == "C"
    events = curl(stream=True).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "C"
    assert "usage" not in chunks[0] and chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_kept_patches_and_times_come_when_asked_for(door: Served) -> None:
    both = {"return_kept": True, "return_timing": True}
    _, _, plain = door.chat(question())
    _, _, whole = door.chat(question(himap=both))
    assert "himap" not in plain
    kept, times = whole["himap"], whole["himap"].pop("timing")
    assert kept["stages"] == ["prefix", "k1", "k2"] and kept["image_tokens"] == [64, 32, 8]
    assert [len(kept["kept"][cut]) for cut in ("k1", "k2")] == [32, 8] and (kept["rows"], kept["columns"]) == (8, 8)
    assert set(times) == {"queue_s", "prefill_s", "first_token_s", "decode_s"}
    assert 0 < times["prefill_s"] < times["first_token_s"]
    _, _, content = door.ask("POST", "/v1/chat/completions", question(himap=both, stream=True))
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in content.split(b"\n\n")[:-2]]
    assert chunks[0]["himap"] == kept and set(chunks[-1]["himap"]) == {"timing"}
    assert all("himap" not in chunk for chunk in chunks[1:-1])


def test_how_an_answer_ends_and_is_drawn(door: Served) -> None:
    def told(asked: str = "how many circles?", **more: object) -> tuple[str, str]:
        status, _, document = door.chat(question(asked, **more))  # type: ignore[arg-type]
        assert status == 200, document
        return document["choices"][0]["message"]["content"], document["choices"][0]["finish_reason"]

    text, reason = told()
    assert reason == "stop" and len(text) > 2
    assert told(max_tokens=1)[1] == told(max_completion_tokens=1)[1] == "length"
    assert told(stop=text[1:3]) == told(stop=["#", text[1:3]]) == (text[:1], "stop")
    drawn = [told("where where where", temperature=2, seed=seed)[0] for seed in (1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6)]
    assert drawn[:6] == drawn[6:] and len(set(drawn)) > 1
    neutral = {"n": 1, "logprobs": False, "tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    assert told(**neutral, user=None, seed=None) == (text, reason)


def test_a_connection_is_kept_and_requests_have_ids(door: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=20)
    for given, known in (("mine-1", True), ("x" * 200, False), ("a b", False), (None, False)):
        headers = JSON | {"authorization": f"Bearer {KEY}"} | ({"x-request-id": given} if given else {})
        connection.request("POST", "/v1/chat/completions", json.dumps(question()), headers)
        socket, answered = connection.sock, connection.getresponse()
        assert answered.status == 200 and json.loads(answered.read())["object"] == "chat.completion"
        assert connection.sock is socket, "the connection was closed"
        assert (answered.getheader("x-request-id") == given) is known and answered.getheader("x-request-id")
    line = next(line for line in door.lines() if line.get("request_id") == "mine-1")
    assert line["event"] == "request" and line["status"] == 200 and line["prompt"] == QUESTION
    assert line["completion_tokens"] == 2 and line["e2e_ms"] >= line["first_token_ms"] > line["prefill_ms"] > 0
    connection.close()


def test_health_needs_no_key(door: Served) -> None:
    no_key = {"authorization": ""}
    assert [door.ask("GET", path, headers=no_key)[0] for path in ("/health", "/health/ready", "/metrics")] == [200] * 3
    assert [door.ask("GET", path, headers=no_key)[0] for path in ("/v1/models", "/v1/nowhere")] == [401] * 2
