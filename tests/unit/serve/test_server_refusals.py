"""What a server refuses, with which status and words; nothing reaches the engine that could end it."""

import asyncio
import gzip
import hashlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.responses import PlainTextResponse
from support.loopback_server import KEY, serving
from support.tiny_directories import model_directory
from support.tiny_server import CHAT, COMPLETIONS, QUESTION, Asking, client, error_of, opened

from erniekit.config import load
from erniekit.generation.load import ChatModel
from erniekit.serve.server import serve
from erniekit.serve.server_access import Gate, key_digests
from erniekit.serve.server_errors import ApiError
from erniekit.utils.addresses import is_loopback
from erniekit.utils.errors import CheckpointError, ConfigError

JSON = {"content-type": "application/json"}
KEY_HEADER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ChatModel:
    return opened(model_dir)


@pytest.fixture(scope="module")
def server(model_dir: Path, model: ChatModel):
    with client(model_dir, model, max_request_mb=1) as asking:
        yield asking
        assert asking.served.thread.is_alive and asking.chat(max_tokens=1), "whatever was asked before"
        assert asking.served.thread.num_running == asking.served.thread.num_waiting == 0


def calling(**function: object) -> dict:
    """A conversation with a call of a function."""
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"} | function}]}]}


def answered(*ids: str) -> dict:
    """A conversation with the calls a and b, and results with these ids."""
    calls = [{"id": name, "function": {"name": "f"}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": "1"} for name in ids]
    return {"messages": [{"role": "assistant", "tool_calls": calls}, *results]}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "expected system"),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood", "unknown field"),
        ({"messages": [7]}, "messages[0]", "expected an object"),
        ({"messages": "hi"}, "messages", "expected array, got string"),
        ({"temperature": "hot"}, "temperature", "expected number"),
        ({"temperature": -1}, "temperature", "0 or more"),
        ({"top_p": -0.5}, "top_p", "0 or more"),
        ({"n": 10**6}, "n", "at most 128"),
        ({"n": True}, "n", "expected integer, got boolean"),
        ({"top_logprobs": 99, "logprobs": True}, "top_logprobs", "at most 20"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "more than max_tokens"),
        ({"stop": ""}, "stop", "1 to 1000"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids", "outside the vocabulary"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"use": 1}}, "stream_options.use", "unknown field"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "is not a token id"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias", "'05' is not a token id"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "is not a token id"),
        ({"logit_bias": {"5": "a"}}, "logit_bias", "expected numbers"),
        ({"min_p": 2}, "min_p", "at most 1"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "must", "tools": [{"function": {"name": "f"}}]}, "tool_choice", "expected auto"),
        ({"tool_choice": "auto"}, "tool_choice", "no tools"),
        ({"tools": [{}]}, "tools[0]", "function"),
        ({"tools": [{"function": {"name": "f", "parameters": True}}]}, "tools[0].function.parameters", "got boolean"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0].function.parameters.type",
         'expected object, got "array"'),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0]", '"type": "function"'),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]}]},
         "messages[0].tool_calls[0].function.arguments", "NaN is not a JSON number"),
        (calling(arguments='{"a": 1, "a": 2}'), "messages[0].tool_calls[0].function.arguments", "'a' stands twice"),
        (calling(arguments='{"a": 1e999}'), "messages[0].tool_calls[0].function.arguments", "too large"),
        (calling(arguments='{"a": "\\ud800"}'), "messages[0].tool_calls[0].function.arguments", "half of a pair"),
        (calling(parameters={"a": 1}), "messages[0].tool_calls[0].function.parameters", "unknown field"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "arguments": "{}"}]}]},
         "messages[0].tool_calls[0].arguments", "unknown field"),
        (answered("a", "c"), "messages[2].tool_call_id", "no call of the message before has the id 'c'; a, b have"),
        (answered("b", "b"), "messages[2].tool_call_id", "has a result already"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "data:"}}]}]},
         "messages[0].content[0].image_url", "unknown field"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]},
         "messages[0].tool_calls[0].type", "expected function"),
        ({"enable_thinking": True}, "enable_thinking", "never thinks"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize", "unknown field"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unknown field"),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "no room"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
         "messages[0].content[0]", "text alone"),
    ],
)  # fmt: skip
def test_fields(server: Asking, fields: dict, param: str, said: str):
    error = server.bad(**fields)
    assert error["param"] == param and said in error["message"] and error["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [[5, -1]]}, "outside the vocabulary"),
        ({"prompt": [5, 10**30]}, "outside the vocabulary"),
        ({"prompt": [5, True]}, "expected token ids"),
        ({"prompt": [{}]}, "expected texts or lists of ids"),
        ({"prompt": []}, "empty"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [""]}, "no tokens"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": ["a"] * 600}, "at most 512 answers"),
        ({"suffix": "b"}, "continue a prompt only"),
        ({"max_tokens": 0}, "1 or more"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "without stream"),
    ],
)
def test_fields_of_completions(server: Asking, fields: dict, said: str):
    assert said in server.bad(COMPLETIONS, **fields)["message"]


@pytest.mark.parametrize("field", [{"tools": [{"function": {"name": "f"}}]}, {"chat_template_kwargs": {"a": 1}}])
def test_parts_of_a_conversation_beside_a_text_to_tokenize(server: Asking, field: dict):
    answer = server.http.post("/tokenize", json={"prompt": "a"} | field)
    assert error_of(answer, 400)["message"].endswith("it is part of a conversation; give messages.")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"max_tokens": 1, "max_tokens": 3}', "'max_tokens' stands twice"),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' stands twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "64 levels"),
        (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"user": "\\ud800"}', "surrogate"),
    ],
)
def test_bodies(server: Asking, body: bytes, said: str):
    assert said in error_of(server.http.post(CHAT, content=body, headers=JSON), 400)["message"]


def test_a_compressed_body(server: Asking):
    answer = server.http.post(CHAT, content=gzip.compress(b"{}"), headers=JSON | {"Content-Encoding": "gzip"})
    assert "send the body uncompressed" in error_of(answer, 415)["message"]


def test_other_paths_methods_kinds_and_sizes(server: Asking):
    http = server.http
    error_of(http.get("/v1/nothing"), 404)
    error_of(http.get(CHAT), 405)
    error_of(http.post("/v1/models"), 405)
    for headers, said in (({"content-type": "text/plain"}, "is 'text/plain'"), ({}, "is missing")):
        assert said in error_of(http.post(CHAT, content=b"{}", headers=headers), 400)["message"]
    assert error_of(http.post(CHAT, content=b"x" * (2 << 20), headers=JSON), 413)["type"] == "RequestTooLargeError"
    pieces = iter([b"x" * (1 << 19)] * 4)  # without a length in the header
    error_of(http.post(CHAT, content=pieces, headers=JSON), 413)
    assert "tiny" in server.bad(status=404, model="gpt-4")["message"]
    error_of(http.get("/v1/models/other"), 404)
    assert http.get("/v1/models/tiny").json()["max_model_len"] == server.served.context
    for path in ("/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd", "//etc/passwd"):
        error_of(http.get(path), 404)
    assert http.get("/version").json()["version"] and http.get("/health").json() == {"status": "ok"}
    assert http.get("/openapi.json").json()["paths"][CHAT]["post"]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil:80",
        "[::1",
        "[::1]evil.example",
        "[::1].evil.example:80",
        "2130706433",
        "",
    ],
)
def test_a_page_whose_name_points_here_is_refused(server: Asking, host: str):
    for path in ("/v1/models", "/health"):
        assert error_of(server.http.get(path, headers={"host": host}), 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/v1/models", 400)])
def test_health_alone_is_answered_without_a_host(path: str, status: int):
    """HAProxy's and other health checks ask by HTTP/1.0."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    gate = Gate(PlainTextResponse("ok"), host="127.0.0.1", allowed_hosts=(), keys=())
    asyncio.run(gate(scope, _nothing, send))
    assert sent[0]["status"] == status


async def _nothing() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


def test_names_of_this_machine_are_answered(server: Asking, model_dir: Path, model: ChatModel):
    for host in ("localhost", "LOCALHOST:8188", "127.0.0.1:1", "127.9.9.9", "[::1]:8188", "[::1]"):
        assert server.http.get("/v1/models", headers={"host": host}).status_code == 200
    with client(model_dir, model, allowed_hosts="my.box") as other:
        assert other.http.get("/v1/models", headers={"host": "my.box:80"}).status_code == 200


def test_pages_of_other_servers_are_refused(server: Asking):
    for origin in ("http://evil.example", "null", "http://localhost:9999", "http://localhost:8188.evil.example"):
        error = error_of(server.http.post(CHAT, json={}, headers={"origin": origin}), 403)
        assert error["code"] == "origin_not_allowed"
    assert server.http.get("/v1/models", headers={"origin": "http://localhost:8188"}).status_code == 200
    assert "access-control-allow-origin" not in server.http.get("/v1/models").headers


def test_keys(model_dir: Path, model: ChatModel, tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-one\n\nsecret-two\n")
    keys = key_digests(str(file), "secret-three")
    assert keys == tuple(hashlib.sha256(f"secret-{n}".encode()).digest() for n in ("three", "one", "two"))
    with client(model_dir, model, keys) as guarded:
        for header in (None, "Bearer", "Bearer secret", "Basic secret-one", "secret-one", "Bearer secret-one x"):
            headers = {} if header is None else {"authorization": header}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1/models/../health"):
                assert error_of(guarded.http.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        for key in ("one", "two", "three"):
            headers = {"authorization": f"Bearer secret-{key}"}
            assert guarded.http.get("/v1/models", headers=headers).status_code == 200
        assert guarded.http.get("/health").status_code == 200
    for text, said in (("# none\n", "holds no key"), ("short\n", "at least 8")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            key_digests(str(file), None)


def test_an_address_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch, model_dir: Path):
    monkeypatch.delenv("ERNIEKIT_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="no key"):
            serve(load(None, {"model_name_or_path": str(model_dir), "host": host}, command="server"))
    assert is_loopback("127.0.0.2") and is_loopback("::1") and not is_loopback("127.0.0.1.evil")


def test_weights_with_which_every_request_would_fail(tmp_path: Path):
    model = opened(model_directory(tmp_path / "broken"))
    norm = model.model.model.norm.weight
    norm.set_value(np.full(norm.shape, np.nan, np.float32))
    with (
        pytest.raises(CheckpointError, match="broken: the model gives scores that are not finite"),
        client(tmp_path / "broken", model),
    ):
        pass


def test_a_port_that_is_taken(model_dir: Path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: {port}: cannot listen"):
            serve(load(None, {"model_name_or_path": str(model_dir), "port": port}, command="server"))


def test_kept_prompts_are_not_shared_between_keys(model_dir: Path, model: ChatModel):
    names = ("first-key", "second-key")
    with client(model_dir, model, tuple(hashlib.sha256(name.encode()).digest() for name in names)) as guarded:

        def cached(path: str, key: str, **prompt: object) -> int:
            headers, body = {"Authorization": f"Bearer {key}"}, {"model": "tiny", "max_tokens": 2} | prompt
            answer = guarded.http.post(path, json=body, headers=headers).json()
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        for path, prompt in ((CHAT, {"messages": QUESTION}), (COMPLETIONS, {"prompt": "25加16等于"})):
            first, other, again = (cached(path, names[which], **prompt) for which in (0, 1, 0))
            assert first == other == 0 < again, path


def test_a_full_queue_is_said_with_the_time_to_come_back(model_dir: Path, model: ChatModel):
    with client(model_dir, model, max_num_seqs=1, max_waiting_requests=1) as small:
        too_many = small.http.post(CHAT, json={"model": "tiny", "messages": QUESTION, "n": 3})
        assert error_of(too_many, 400)["param"] == "n" and too_many.headers["x-should-retry"] == "false"
        assert "at most 2 at a time" in small.bad(COMPLETIONS, prompt=["a"] * 3)["message"]
        small.served.thread.num_reserved = 1  # by another request
        answer = small.http.post(CHAT, json={"model": "tiny", "messages": QUESTION, "n": 2})
        small.served.thread.num_reserved = 0
        assert error_of(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"] == "1"
        assert "x-should-retry" not in answer.headers
        assert len(small.chat(n=2, max_tokens=1)["choices"]) == 2, "places are given back"
        assert 'admission_rejections_total{model_name="tiny"} 1.0' in small.http.get("/metrics").text


def test_time_limits(model_dir: Path, model: ChatModel, monkeypatch: pytest.MonkeyPatch):
    with client(model_dir, model, max_num_seqs=1, request_timeout=3.0) as slow:
        step = slow.served.thread.engine.step
        monkeypatch.setattr(slow.served.thread.engine, "step", lambda: (time.sleep(0.05), step())[1])
        busy = threading.Thread(target=lambda: slow.bad(status=408, max_tokens=4000, ignore_eos=True))
        busy.start()
        while busy.is_alive() and not slow.served.thread.num_running:
            time.sleep(0.01)
        slow.served.cfg = replace(slow.served.cfg, queue_timeout=0.2)
        assert slow.bad(status=408, stream=True)["code"] == "queue_timeout"
        busy.join()
        wait_until_idle(slow)


def wait_until_idle(server: Asking) -> None:
    for _ in range(500):
        if server.served.thread.engine.is_idle:
            return
        time.sleep(0.01)
    pytest.fail("the engine still computes")


def test_a_client_that_does_not_read_ends_its_answer(server: Asking, monkeypatch: pytest.MonkeyPatch):
    """The connection takes the first pieces and no more."""
    monkeypatch.setattr("erniekit.serve.server_stream.WRITE_SECONDS", 0.2)
    body, sent = {"model": "tiny", "messages": QUESTION, "stream": True, "ignore_eos": True}, []
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": CHAT, "raw_path": CHAT.encode()}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "headers": [
        (b"host", b"localhost"), (b"content-type", b"application/json")]}  # fmt: skip

    async def ask() -> None:
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> dict:
            if (message := next(messages, None)) is not None:
                return message
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message["type"])
            if len(sent) > 4:
                await asyncio.sleep(60)

        await asyncio.wait_for(server.http.app(scope, receive, send), 30)

    server.http.portal.call(ask)
    wait_until_idle(server)
    assert len(sent) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(server: Asking, stream: bool):
    """The client closes its connection once the engine runs."""
    app, body = server.http.app, {"model": "tiny", "messages": QUESTION, "stream": stream, "ignore_eos": True}
    thread = server.served.thread
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": CHAT, "raw_path": CHAT.encode()}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "headers": [
        (b"host", b"localhost"), (b"content-type", b"application/json")]}  # fmt: skip

    async def ask() -> None:
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> dict:
            if (message := next(messages, None)) is not None:
                return message
            while not thread.num_running:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        await app(scope, receive, send)

    before = aborted(server)
    server.http.portal.call(ask)
    wait_until_idle(server)
    assert [now - then for now, then in zip(aborted(server), before, strict=True)] == [
        1,
        len(server.served.chat_model.template.prompt_ids(QUESTION)),
    ]


def aborted(server: Asking) -> list[float]:
    """How many answers were aborted, and how many tokens of prompts were read."""
    lines = [line.split() for line in server.http.get("/metrics").text.splitlines()]
    names = ('request_success_total{finished_reason="abort"', "prompt_tokens_total{")
    return [sum(float(line[1]) for line in lines if line[0].startswith(f"erniekit:{name}")) for name in names]


def test_an_engine_that_fails_says_so(model_dir: Path, model: ChatModel, monkeypatch: pytest.MonkeyPatch):
    with client(model_dir, model) as dying:
        monkeypatch.setattr(dying.served.thread.engine, "step", lambda: 1 / 0)
        assert "ZeroDivisionError" in dying.bad(status=500)["message"]
        assert error_of(dying.http.get("/health"), 503)["code"] == "engine_failed"
        assert dying.bad(status=503)["code"] == "engine_failed", "later requests do not wait for ever"


def test_a_request_for_a_websocket_is_answered_like_any_other(model_dir: Path):
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "eA==",
        "Sec-WebSocket-Version": "13",
    }
    with serving(model_dir) as url:
        answer = httpx.get(f"{url}/models", headers=KEY_HEADER | upgrade)
        assert answer.status_code == 200 and answer.json()["object"] == "list"
        error_of(httpx.get(f"{url}/ws", headers=KEY_HEADER | upgrade), 404)


def test_a_server_that_ends_tells_its_clients(model_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Requests that take longer than the server waits, streamed and whole, running and in the queue."""
    monkeypatch.setattr("erniekit.serve.server.GRACE", 0.2)
    said: list[tuple[int, str]] = []

    def ask(url: str, stream: bool) -> None:
        body = {"model": "m", "messages": QUESTION, "stream": stream, "ignore_eos": True, "max_tokens": 4000}
        answer = httpx.post(f"{url}/chat/completions", json=body, headers=KEY_HEADER, timeout=60)
        said.append((answer.status_code, answer.text))

    with serving(model_dir, max_num_seqs=4) as url:
        asking = [threading.Thread(target=ask, args=(url, bool(number % 2)), daemon=True) for number in range(8)]
        for thread in asking:
            thread.start()
        metrics = f"{url.removesuffix('/v1')}/metrics"
        for _ in range(500):
            text = httpx.get(metrics, headers=KEY_HEADER).text
            if all(f'num_requests_{state}{{model_name="m"}} 4.0' in text for state in ("running", "waiting")):
                break
            time.sleep(0.01)
    for thread in asking:
        thread.join(20)
    statuses = [status for status, _ in said]  # a stream has its status from its first chunk on
    assert len(said) == 8 and set(statuses) <= {200, 503} and statuses.count(503) >= 4
    for status, text in said:
        events = text.removesuffix("\n\n").split("\n\n")
        assert status == 503 or (events[0].startswith("data: {") and events[-1] == "data: [DONE]")
        error = json.loads(text if status == 503 else events[-2].removeprefix("data: "))["error"]
        assert (error["code"], error["message"]) == ("server_closing", "the server is closing.")
    assert "Traceback" not in capfd.readouterr().err


def test_after_its_end_an_engine_keeps_nobody_waiting(model_dir: Path, model: ChatModel):
    with client(model_dir, model) as ending:
        ending.served.thread.end()
        with pytest.raises(ApiError, match="the server is closing"):
            ending.http.portal.call(ending.served.thread.run, lambda: 1)
        assert ending.bad(status=503)["code"] == "server_closing"
        assert error_of(ending.http.get("/health"), 503)["code"] == "server_closing"


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_a_package_that_is_not_installed_is_named(package: str):
    import subprocess
    import sys

    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['erniekit', 'server', 'port=0']\n"
    code += "from erniekit.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 70)
    assert f"`erniekit server` needs {package}: pip install 'erniekit[serve]'" in done.stderr
    assert "bug in erniekit" not in done.stderr
