"""OpenAI's client for Node and Vercel's AI SDK, the strictest readers of streams, against a server on a real socket."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pictures import write_picture
from support.tiny_server import QUESTION, rigged
from support.vision_directories import vision_model_directory

uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow
CLIENTS = Path(__file__).parents[1] / "clients"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the clients, installed; skipped where Node, npm or its registry cannot be had."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    directory = tmp_path_factory.mktemp("clients")
    for name in ("package.json", "clients.mjs"):
        shutil.copy(CLIENTS / name, directory)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"npm cannot install the clients: {done.stderr[-300:]}")
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """(the address, what is served) of a tiny vision-language model, in a thread of this process."""
    from erniekit.config import load
    from erniekit.generation.load import open_model
    from erniekit.serve.server import prepare
    from erniekit.serve.server_app import make_app

    directory = vision_model_directory(tmp_path_factory.mktemp("model") / "tiny", weights=True, max_pixels=84 * 84)
    cfg = load(None, {"model_name_or_path": str(directory), "compute_type": "fp32", "temperature": 0}, command="server")
    served = prepare(cfg, open_model(cfg), ())
    listener = uvicorn.Server(uvicorn.Config(make_app(served), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
        time.sleep(0.05)
    port = listener.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1", served
    listener.should_exit = True
    thread.join(30)


@pytest.fixture
def ask(packages: Path, server: tuple[str, Any], tmp_path: Path):
    write_picture(tmp_path / "picture.png", 60, 70, seed=1)

    def asked(client: str, task: str) -> dict[str, Any]:
        command = ["node", "clients.mjs", client, task, server[0], str(tmp_path / "picture.png")]
        done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return asked


@pytest.fixture(params=["openai", "ai-sdk"])
def client(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_stream_is_the_answer(ask, client: str, server: tuple[str, Any]):
    whole, stream = ask(client, "plain"), ask(client, "stream")
    assert whole["text"] and whole["finish"] == "length" and whole["tokens"] == 8
    assert stream == whole | {"pieces": whole["text"]}


def test_calls_of_tools(ask, client: str, server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch):
    with rigged(monkeypatch, server[1], CALL):
        found = ask(client, "tools")
    for answer in (found["whole"], found["stream"]):
        (call,) = answer["calls"]
        assert (call["name"], call["arguments"]) == ("get_weather", {"city": "Paris"}) and call["id"]
        assert answer["finish"] == {"openai": "tool_calls", "ai-sdk": "tool-calls"}[client]
        assert not answer["text"]


def test_answers_in_a_given_form(ask, client: str):
    """OpenAI's json_schema, whole and streamed, and generateObject, which checks the object by its own schema too."""
    pytest.importorskip("llguidance")
    found = ask(client, "structured")
    for answer in found.values():
        assert sorted(answer) == ["sum", "unit"] and answer["unit"] in ("cm", "kg") and 0 <= answer["sum"] <= 99
    assert found.get("stream", found["whole"]) == found["whole"]


def test_a_picture(ask, client: str):
    seen, blind = ask(client, "vision"), ask(client, "plain")
    assert seen["tokens"] == 8 and seen["text"] != blind["text"]


def test_an_error_has_its_words(ask, client: str):
    error = ask(client, "error")
    if client == "openai":
        assert (error["status"], error["param"]) == (400, "temprature") and "did you mean temperature" in error[
            "message"
        ]
    else:
        assert error["status"] == 404 and "other" in error["message"]


def test_both_say_the_same(ask):
    assert ask("openai", "plain")["text"] == ask("ai-sdk", "plain")["text"]
    assert QUESTION[0]["content"] in (CLIENTS / "clients.mjs").read_text(encoding="utf-8")
