"""A server of a tiny model, asked in the same process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from erniekit.config import load
from erniekit.generation import choosing
from erniekit.generation.load import ChatModel
from erniekit.serve.served_adapters import open_with_adapters
from erniekit.serve.server import prepare
from erniekit.serve.server_app import make_app
from erniekit.serve.server_state import Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "25加16等于几？"}]


def opened(model_dir: Path, **keys: object) -> ChatModel:
    return open_with_adapters(_settings(model_dir, **keys))


def _settings(model_dir: Path, **keys: object):
    values = {"model_name_or_path": str(model_dir), "compute_type": "fp32", "served_model_name": "tiny"}
    return load(None, values | {"temperature": 0} | keys, command="server")


@contextmanager
def client(model_dir: Path, model: ChatModel | None = None, keys: tuple[bytes, ...] = (), **settings: object):
    """(a client, what it asks) of a server of its own; `model` saves loading the weights again."""
    cfg = _settings(model_dir, **settings)
    served = prepare(cfg, model or open_with_adapters(cfg), keys)
    with TestClient(make_app(served), base_url="http://localhost:8188", raise_server_exceptions=False) as asking:
        yield Asking(asking, served)


class Asking:
    """Sends requests and reads answers."""

    def __init__(self, http: TestClient, served: Served) -> None:
        self.http, self.served = http, served

    def chat(self, **fields: Any) -> dict[str, Any]:
        return self.good(CHAT, {"messages": QUESTION, "max_tokens": 8} | fields)

    def complete(self, **fields: Any) -> dict[str, Any]:
        return self.good(COMPLETIONS, {"prompt": "25加16", "max_tokens": 8} | fields)

    def good(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post(path, json={"model": "tiny"} | body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def bad(self, path: str = CHAT, status: int = 400, **fields: Any) -> dict[str, Any]:
        """The error that a request gets, whose shape is checked."""
        body = {"model": "tiny"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"}) | fields
        return error_of(self.http.post(path, json=body), status)

    def stream(self, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ends as one has to."""
        body = {"model": "tiny", "stream": True, "max_tokens": 8}
        body |= {"messages": QUESTION} if path == CHAT else {"prompt": "25加16"}
        answer = self.http.post(path, json=body | fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
        assert events[-1] == "data: [DONE]" and all(event.startswith("data: ") for event in events)
        return [json.loads(event[6:]) for event in events[:-1]]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, (answer.status_code, answer.text)
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return body["error"]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that the deltas of one choice make, put together as clients do."""
    message: dict[str, Any] = {"tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    message[name] += value
                else:
                    message[name] = message.get(name, "") + value
            if choice["finish_reason"]:
                message["finish_reason"] = choice["finish_reason"]
    return message


@contextmanager
def rigged(monkeypatch, served: Served, text: str) -> Iterator[None]:
    """The model says `text` and ends, to whatever it is asked."""
    ids = [*served.chat_model.tokenizer.encode(text), served.limits.stop_ids[0]]

    def fill(table, scores, rows) -> None:
        for line, row in zip(table, rows, strict=True):
            line[0] = ids[len(row.answer.ids)]

    with monkeypatch.context() as patch:
        patch.setattr(choosing, "_fill", fill)
        yield
