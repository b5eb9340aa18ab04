"""Answers in a given form: whatever a random model would say, they parse."""

import datetime
import ipaddress
import json
import re
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_directories import model_directory
from support.tiny_server import COMPLETIONS, QUESTION, Asking, client, joined, opened

from erniekit import LLM, SamplingParams
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.generation.guided import Grammars, Guide
from erniekit.generation.load import ChatModel
from erniekit.utils.errors import UserError

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cold", "warm"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 40}, "maxItems": 2},
    },
    "required": ["city", "kind", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "forecast")]
LONG = {"max_tokens": 300, "temperature": 1.0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ChatModel:
    return opened(model_dir)


@pytest.fixture(scope="module")
def server(model_dir: Path, model: ChatModel):
    with client(model_dir, model) as asking:
        yield asking


def fits(text: str) -> bool:
    value = json.loads(text)
    assert set(value) == {"city", "kind", "days"} and value["kind"] in ("cold", "warm")
    assert len(value["city"]) <= 6 and all(isinstance(day, int) and 0 <= day <= 40 for day in value["days"])
    return len(value["days"]) <= 2


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=["openai", "fastdeploy", "vllm"],
)
def test_whatever_is_drawn_the_answer_follows_the_schema(server: Asking, fields: dict):
    answers = [server.chat(n=16, seed=seed, **LONG, **fields) for seed in range(2)]
    choices = [choice for answer in answers for choice in answer["choices"]]
    assert all(fits(choice["message"]["content"]) for choice in choices)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert len({choice["message"]["content"] for choice in choices}) > 20
    streamed = server.stream(seed=0, **LONG, **fields)
    assert joined(streamed)["content"] == choices[0]["message"]["content"]
    greedy = server.complete(temperature=0, max_tokens=300, **fields)["choices"][0]
    assert fits(greedy["text"]) and greedy["finish_reason"] == "stop"


def test_other_forms(server: Asking):
    for seed in range(3):
        ask = {"seed": seed, **LONG}
        assert server.chat(guided_choice=["a", 'b "c"'], **ask)["choices"][0]["message"]["content"] in ("a", 'b "c"')
        text = server.chat(structured_outputs={"regex": "[0-9]{3}-[ab]+c"}, **ask)["choices"][0]["message"]["content"]
        assert re.fullmatch("[0-9]{3}-[ab]+c", text)
        assert server.complete(guided_grammar='start: "x" NUM\nNUM: /[0-9]{2}/', **ask)["choices"][0]["text"][0] == "x"
    named = server.complete(guided_grammar='start: OPENING_TAG "x"\nOPENING_TAG: /[0-9]{2}/', seed=0, **LONG)
    assert re.fullmatch("[0-9]{2}x", named["choices"][0]["text"]), "the names in a grammar are its own"
    cut = server.chat(response_format={"type": "json_object"}, seed=1, temperature=1.0, max_tokens=5)["choices"][0]
    assert cut["message"]["content"].startswith("{") and cut["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("date", datetime.date.fromisoformat),
        ("time", lambda text: datetime.time.fromisoformat(text[:8])),
        ("date-time", lambda text: datetime.datetime.fromisoformat(text[:19])),
        ("uuid", uuid.UUID),
        ("ipv4", ipaddress.IPv4Address),
        ("ipv6", ipaddress.IPv6Address),
    ],
)
def test_formats_of_texts(server: Asking, form: str, read: Callable[[str], object]):
    answer = server.chat(guided_json={"type": "string", "format": form}, n=4, seed=1, **LONG)
    for choice in answer["choices"]:
        read(json.loads(choice["message"]["content"]))


def test_every_format_that_is_named_is_known(model: ChatModel):
    grammars = Grammars(model.tokenizer, model.model.config.vocab_size, (2,))
    with pytest.raises(UserError) as refused:
        grammars.compiled(Guide("json", {"type": "string", "format": "path"}), False)
    named = re.search("formats of texts are (.*);", str(refused.value))
    assert named is not None
    for form in re.split(", | and ", named[1]):
        grammars.compiled(Guide("json", {"type": "string", "format": form}), False)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_text_that_looks_like_a_special_token_is_spelled(model_dir: Path, model: ChatModel, tmp_path: Path, file: str):
    for name in ("tokenizer_config.json", file):
        shutil.copy(model_dir / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.find_id("<think>") in tokenizer.special_tokens.values()
    grammars = Grammars(tokenizer, model.model.config.vocab_size, (tokenizer.eos_id,))
    for guide in (Guide("choice", ["a<think>b"]), Guide("regex", "a<think>b"), Guide("json", {"const": "<s>"})):
        state, ids = grammars.compiled(guide, is_in_thought=False).state(), list[int]()
        while not ids or ids[-1] != tokenizer.eos_id:
            ids.append(int(np.flatnonzero(state(ids))[-1]))
            assert not state.error
        assert tokenizer.decode(ids[:-1]) in ("a<think>b", '"<s>"')
        assert not set(ids[:-1]) & set(tokenizer.special_tokens.values())


def test_a_demanded_call_is_a_call(server: Asking):
    for seed in range(2):
        answer = server.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, **LONG)
        (choice,) = answer["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert fits(call["function"]["arguments"]) and choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert call["function"]["name"] in ("weather", "forecast")
        named = {"type": "function", "function": {"name": "forecast"}}
        streamed = joined(server.stream(tools=TOOLS, tool_choice=named, seed=seed, **LONG))
        assert [call["function"]["name"] for call in streamed["tool_calls"]] == ["forecast"]


REFERRING = {
    "$defs": {"Day": {"type": "integer", "minimum": 0, "maximum": 9}},
    "type": "object",
    "properties": {"day": {"$ref": "#/$defs/Day"}, "then": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["day", "then"],
    "additionalProperties": False,
}


def test_references_in_the_parameters_of_a_tool_are_its_own(server: Asking):
    """As pydantic writes nested models; "#" is the function's parameters, not the call around them."""
    tools = [{"type": "function", "function": {"name": '天气 "x"', "parameters": REFERRING}}]
    named = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    for seed in range(3):
        (call,) = server.chat(tools=tools, tool_choice=named, seed=seed, **LONG)["choices"][0]["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        while arguments is not None:
            assert set(arguments) == {"day", "then"} and 0 <= arguments["day"] <= 9
            arguments = arguments["then"]


def test_parameters_without_a_type_are_those_of_an_object(server: Asking):
    parameters = {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for seed in range(3):
        message = server.chat(tools=tools, tool_choice="required", parallel_tool_calls=False, seed=seed, **LONG)
        (call,) = message["choices"][0]["message"]["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) == {"a"}


def test_alternatives_are_told_apart_by_their_discriminator(server: Asking):
    """As pydantic writes a union with a discriminator that has a default."""

    def kind(name: str) -> dict:
        return {
            "type": "object",
            "properties": {"kind": {"const": name, "default": name}, "on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        }

    union = {
        "$defs": {"Lamp": kind("lamp"), "Fan": kind("fan")},
        "oneOf": [{"$ref": "#/$defs/Lamp"}, {"$ref": "#/$defs/Fan"}],
        "discriminator": {"propertyName": "kind", "mapping": {"lamp": "#/$defs/Lamp", "fan": "#/$defs/Fan"}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": union}}]
    for seed in range(4):
        form = union if seed % 2 else json.dumps(union)
        answer = json.loads(server.chat(guided_json=form, seed=seed, **LONG)["choices"][0]["message"]["content"])
        message = server.chat(tools=tools, tool_choice="required", parallel_tool_calls=False, seed=seed, **LONG)
        call = json.loads(message["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
        for found in (answer, call):
            assert found.keys() == {"kind", "on"} and found["kind"] in ("lamp", "fan")


def test_the_form_begins_behind_the_thought(model_dir: Path):
    with client(model_dir, chat_template="thinking") as thinking:
        closing = thinking.served.chat_model.tokenizer.token_id("</think>")
        ask = {"guided_json": SCHEMA, "logit_bias": {str(closing): 5}, "return_token_ids": True} | LONG
        for seed in range(3):
            (choice,) = thinking.chat(**ask, seed=seed)["choices"]
            place = choice["token_ids"].index(closing)
            assert fits(choice["message"]["content"])
            assert bool(choice["message"].get("reasoning")) == (place > 0) or place < 3


def test_from_python(model_dir: Path):
    llm = LLM(model_dir, dtype="float32")
    params = SamplingParams(structured_outputs={"json": SCHEMA}, max_tokens=300, n=4, seed=2)
    for result in (*llm.chat(QUESTION, params), *llm.generate(["a", "b"], params)):
        assert all(fits(output.text) for output in result.outputs)
    with pytest.raises(UserError, match="foo"):
        llm.generate("a", SamplingParams(structured_outputs={"json": {"type": "foo"}}))


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"guided_json": {"type": "foo"}}, "guided_json", "Invalid type: foo"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        (
            {"guided_json": {"type": "string", "format": "path"}},
            "guided_json",
            "ipv6, uuid and uri; leave another one out",
        ),
        ({"guided_json": {"$ref": "http://example.org/a"}}, "guided_json", "not fetch"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": '{"type": "integer", "type": "boolean"}'}, "guided_json", "'type' stands twice"),
        ({"guided_json": "true"}, "guided_json", "expected a JSON schema, got boolean"),
        ({"guided_regex": "[a-"}, "guided_regex", "unclosed"),
        ({"guided_regex": "(" * 200_000}, "guided_regex", "cannot be used"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "unknown name"),
        ({"guided_json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "guided_json", "Write anyOf."),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "cannot be used"),
        ({"guided_choice": []}, "guided_choice", "list of 1 to"),
        ({"guided_choice": [""]}, "guided_choice", "not empty"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json", "cannot both"),
        ({"structured_outputs": {}}, "structured_outputs", "expected one of"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "expected one of"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "expected a JSON schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"guided_json": {}, "min_tokens": 3}, "min_tokens", "ends where"),
        ({"guided_json": {}, "ignore_eos": True}, "ignore_eos", "ends where"),
        ({"guided_json": {}, "tools": TOOLS}, "guided_json", "tool_choice: none"),
        ({"guided_json": {}, "tools": TOOLS, "tool_choice": "required"}, "guided_json", "cannot both"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "weather"}}}, "tool_choice", "weather, forecast"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "weather, forecast"),
        (
            {
                "tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "foo"}}}}}],
                "tool_choice": "required",
            },
            "tool_choice",
            "foo",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(server: Asking, fields: dict, param: str, said: str):
    error = server.bad(**fields)
    assert said in error["message"] and error["param"] == param
    if "tools" not in fields and "response_format" not in fields:
        assert server.bad(COMPLETIONS, **fields)["param"] == param


def test_an_answer_that_cannot_go_further_ends_with_an_error(model: ChatModel):
    grammars = Grammars(model.tokenizer, model.model.config.vocab_size, [2, 4])
    state = grammars.compiled(Guide("regex", "[a-c]{4}"), False).state()
    wrong = model.tokenizer.encode("x")[0]
    mask = state([wrong])
    assert state.error and mask is not None and mask.nonzero()[0].tolist() == [2, 4]


def test_without_the_library_the_extra_is_named(server: Asking, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "erniekit[guided]" in server.bad(guided_json={})["message"]
