"""A server with several adapters: each request gets the answers of the adapter that it names as its model."""

from pathlib import Path

import pytest
from support.adapters import attach_random
from support.tiny_directories import model_directory
from support.tiny_server import QUESTION, Asking, client, opened

from erniekit import LLM, SamplingParams, lora
from erniekit.build import load_model
from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.generation.load import ChatModel
from erniekit.utils.errors import CheckpointError, ConfigError, UserError

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    model_directory(root / "m")
    save_adapter(attach_random(load_model(root / "m")), root / "sql")
    save_adapter(attach_random(load_model(root / "m"), targets=("o_proj",), rank=2, alpha=40.0), root / "code")
    return root


@pytest.fixture(scope="module")
def server(root: Path):
    with client(root / "m", lora_modules=[f"sql={root / 'sql'}", f"code={root / 'code'}"]) as asking:
        yield asking


def alone(root: Path, name: str) -> str:
    llm = LLM(root / name, model_name_or_path=str(root / "m"), dtype="float32")
    return llm.chat(QUESTION, GREEDY)[0].outputs[0].text


def test_the_model_of_a_request_is_the_base_or_an_adapter(server: Asking, root: Path):
    listed = server.http.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [("tiny", None), ("sql", "tiny"), ("code", "tiny")]
    assert server.http.get("/v1/models/sql").json()["id"] == "sql"
    said = {name: server.chat(model=name) for name in ("tiny", "sql", "code")}
    texts = {name: body["choices"][0]["message"]["content"] for name, body in said.items()}
    assert texts == {"tiny": alone(root, "m"), "sql": alone(root, "sql"), "code": alone(root, "code")}
    assert len(set(texts.values())) == 3
    assert [body["model"] for body in said.values()] == list(said)
    assert server.chat(model="sql")["choices"] == said["sql"]["choices"], "what is kept of another adapter is not used"
    scores = {
        name: server.complete(model=name, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
        for name in ("tiny", "sql")
    }
    assert scores["tiny"]["token_logprobs"][1] != scores["sql"]["token_logprobs"][1]


def test_an_unknown_adapter_is_not_found(server: Asking):
    error = server.bad(status=404, model="sq")
    assert error["code"] == "model_not_found" and "'tiny', 'sql', 'code' are" in error["message"]


def test_adapters_by_name_from_python(root: Path):
    llm = LLM(root / "m", dtype="float32", lora_modules={"sql": root / "sql"})
    assert llm.chat(QUESTION, GREEDY, lora_request="sql")[0].outputs[0].text == alone(root, "sql")
    assert llm.chat(QUESTION, GREEDY)[0].outputs[0].text == alone(root, "m")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with_adapter, without = (llm.generate("25加16", params, lora_request=name)[0] for name in ("sql", None))
    assert with_adapter.prompt_logprobs[1:] != without.prompt_logprobs[1:]
    with pytest.raises(UserError, match="'code' is not served here"):
        llm.generate("a", lora_request="code")


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["sql"], "expected name=directory, got 'sql'"),
        (["=x"], "expected name=directory"),
        (["a={root}/sql", "a={root}/code"], "another model of this name"),
        (["tiny={root}/sql"], "another model of this name"),
        (["a={root}/nowhere"], "lora_modules: a: .*nowhere"),
        (["a={root}/m"], "lora_modules: a: .*holds no adapter"),
        (["a={root}/other"], "lora_modules: a: .*another base"),
        (["a={root}/whole"], "lora_modules: a: .*modules_to_save"),
    ],
)
def test_wrong_adapters_are_refused_before_weights_are_read(
    root: Path, modules: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    if not (root / "other").is_dir():
        other = load_model(model_directory(root / "other-base", seed=9))
        attach_random(other)
        lora.state_of(other).base_fingerprint = fingerprint(root / "other-base")  # as a training sets it
        save_adapter(other, root / "other")
        save_adapter(attach_random(load_model(root / "m"), modules_to_save=("embed_tokens",)), root / "whole")
    monkeypatch.setattr("erniekit.generation.load.PreparedChatModel.load", lambda self: pytest.fail("weights are read"))
    with pytest.raises((CheckpointError, ConfigError), match=said):
        opened(root / "m", lora_modules=[entry.format(root=root) for entry in modules])


def test_an_adapter_as_the_model_has_no_others_beside_it(root: Path):
    with pytest.raises(ConfigError, match="is itself an adapter"):
        LLM(root / "sql", model_name_or_path=str(root / "m"), lora_modules={"code": root / "code"})


def test_the_base_is_plain_where_no_adapter_is_given(root: Path):
    model: ChatModel = opened(root / "m")
    with client(root / "m", model) as asking:
        assert asking.served.adapters == ()
        assert "'tiny' is" in asking.bad(status=404, model="sql")["message"]
