"""`erniekit server` as a process on a real socket, asked by OpenAI's client and by its OpenAPI document."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from support.pictures import write_picture
from support.vision_directories import vision_model_directory

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
PARTS = [{"type": "text", "text": "25加16等于几？"}]
QUESTION = [{"role": "user", "content": PARTS[0]["text"]}]
KEY = "secret-of-the-test"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = vision_model_directory(tmp_path_factory.mktemp("server") / "tiny", weights=True, max_pixels=84 * 84)
    keys = directory.parent / "keys"
    keys.write_text(KEY + "\n")
    words = [f"model_name_or_path={directory}", "compute_type=fp32", "port=0", f"api_key_file={keys}", "temperature=0"]
    command = [sys.executable, "-m", "erniekit", "server", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"served at (http://\S+)/v1", line):
            break
    else:
        pytest.fail("".join(said))
    yield found[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, process.stderr.read()


def metric(address: str, name: str) -> float:
    request = urllib.request.Request(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if line.startswith(f"erniekit:{name}{{")]
    return float(line.split()[-1])


def test_openais_client_gets_whole_and_streamed_answers_and_errors(address: str):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask = {"model": "tiny", "messages": QUESTION, "max_tokens": 8}
    whole = client.chat.completions.create(**ask, n=2, logprobs=True, extra_body={"top_k": 5})
    with (
        pytest.raises(openai.LengthFinishReasonError) as cut,  # how this client reports max_tokens
        client.chat.completions.stream(**ask, n=2, stream_options={"include_usage": True}) as stream,
    ):
        for _ in stream:
            pass
        stream.get_final_completion()
    final = cut.value.completion
    assert [choice.message.content for choice in final.choices] == [c.message.content for c in whole.choices]
    assert final.usage.completion_tokens == whole.usage.completion_tokens == 16
    assert final.choices[0].message.role == "assistant"
    text = client.completions.create(model="tiny", prompt="25加16", max_tokens=4, logprobs=2)
    assert len(text.choices[0].logprobs.tokens) == 4
    with pytest.raises(openai.BadRequestError, match="did you mean temperature") as caught:
        client.chat.completions.create(**ask, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**ask | {"model": "other"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="EMPTY", max_retries=0).models.list()


class Sum(pydantic.BaseModel):
    """Small enough that a model which has learnt nothing reaches its end."""

    sum: int = pydantic.Field(ge=0, le=99)
    unit: Literal["cm", "kg"]


def test_openais_client_gets_objects_and_calls_and_sends_pictures(address: str, tmp_path: Path):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    ask = {"model": "tiny", "messages": QUESTION, "max_tokens": 8}
    write_picture(tmp_path / "picture.png", 60, 70, seed=1)
    data = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    seen = client.chat.completions.create(**ask | {"messages": [{"role": "user", "content": [image, *PARTS]}]})
    blind = client.chat.completions.create(**ask)
    assert seen.choices[0].message.content != blind.choices[0].message.content
    assert seen.usage.prompt_tokens > blind.usage.prompt_tokens + 4
    pytest.importorskip("llguidance")
    ask["max_tokens"] = 100
    said = client.chat.completions.parse(**ask, response_format=Sum).choices[0].message
    assert isinstance(said.parsed, Sum)
    tools = [openai.pydantic_function_tool(Sum, name="report")]
    with warnings.catch_warnings(action="ignore"):  # of pydantic, about `parsed`, which the client sends back
        history = [
            client.chat.completions.create(**ask | {"messages": [*QUESTION, m, *QUESTION]})
            for m in (said, {"role": "assistant", "content": said.content})
        ]
    assert history[0].choices[0].message.content == history[1].choices[0].message.content
    for stream in (False, True):
        if stream:
            with client.chat.completions.stream(**ask, tools=tools, tool_choice="required") as events:
                answer = events.get_final_completion()
        else:
            answer = client.chat.completions.parse(
                **ask, tools=tools, tool_choice="required", parallel_tool_calls=False
            )
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "report" and isinstance(call.function.parsed_arguments, Sum)
        assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_socket_frees_its_place(address: str, stream: bool):
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "messages": QUESTION, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: metric(address, "num_requests_running") == 1)
    wait_for(lambda: metric(address, "num_requests_running") == 0)


def wait_for(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it does not happen")


@pytest.mark.slow
def test_schemathesis_finds_no_defect(address: str):
    """Requests made from the document, valid and not: no 500, and each answer as the document says."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"{address}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error,"
                "status_code_conformance,content_type_conformance,response_schema_conformance",
                "--max-examples", "20", "--request-timeout", "120",
                "--seed", "1", "--generation-deterministic"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
