"""A server with several adapters: each request gets the answers of the adapter that it names as its model."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.adapters import attach_random
from support.tiny_directories import model_directory
from support.tiny_server import COMPLETIONS, QUESTION, Asking, client, error_of, opened
from support.tiny_sizes import KINDS

from erniekit import LLM, SamplingParams, lora
from erniekit.build import load_model
from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.generation.engine import Engine
from erniekit.generation.load import ChatModel
from erniekit.generation.request import Limits, Request
from erniekit.generation.sampling import Sampling
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


def test_an_adapter_that_is_not_finite_is_refused(root: Path, tmp_path: Path):
    model = attach_random(load_model(root / "m"))
    trained = next(parameter for parameter in model.parameters() if not parameter.stop_gradient)
    trained.set_value(trained * float("inf"))
    save_adapter(model, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"lora_modules: bad: .*lora_A.weight has values that are not finite"):
        opened(root / "m", lora_modules=[f"bad={tmp_path / 'bad'}"])
    with client(root / "m", lora_directory=str(tmp_path)) as asking:
        error = asking.http.post("/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": str(tmp_path / "bad")})
        assert "not finite" in error_of(error, 400)["message"]
        assert asking.chat(max_tokens=1)["choices"]


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
        (["a={root}/sql", "a={root}/code"], "another adapter of this name"),
        (["tiny={root}/sql"], "the name of the model itself"),
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


def test_an_adapter_with_the_name_of_the_models_directory_is_refused_before_weights_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("erniekit.generation.load.PreparedChatModel.load", lambda self: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match="m is the name of the model itself"):
        LLM(root / "m", lora_modules={"m": root / "sql"})


def test_an_adapter_as_the_model_has_no_others_beside_it(root: Path):
    with pytest.raises(ConfigError, match="is itself an adapter"):
        LLM(root / "sql", model_name_or_path=str(root / "m"), lora_modules={"code": root / "code"})


def test_the_base_is_plain_where_no_adapter_is_given(root: Path):
    model: ChatModel = opened(root / "m")
    with client(root / "m", model) as asking:
        assert asking.served.adapters == ()
        assert "'tiny' is" in asking.bad(status=404, model="sql")["message"]


# --- adapters that come and go

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def changed(asking: Asking, path: str, **fields: str) -> None:
    answer = asking.http.post(path, json=fields)
    assert answer.status_code == 200, answer.text


def refused(asking: Asking, path: str, status: int, **fields: str) -> str:
    return error_of(asking.http.post(path, json=fields), status)["message"]


def scores(asking: Asking, name: str) -> list[float]:
    """Log-probabilities of a text and of what a model adds to it; what is kept of a prompt changes their last bits."""
    answer = asking.complete(model=name, echo=True, logprobs=0, max_tokens=4)
    return answer["choices"][0]["logprobs"]["token_logprobs"][1:]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_adapters_come_and_go_while_the_server_runs(tmp_path: Path, kind: str):
    """Each answers as it does where it was there from the start, also with others beside it."""
    sizes = {name: value for name, value in KINDS[kind].items() if name != "vocab_size"}
    model_directory(tmp_path / "m", **sizes)
    for seed, name in enumerate(("one", "two")):
        save_adapter(attach_random(load_model(tmp_path / "m"), rank=2 + seed), tmp_path / "a" / name)
    names = ("one", "two")
    with client(tmp_path / "m", lora_modules=[f"{name}={tmp_path / 'a' / name}" for name in names]) as asking:
        wanted = {name: scores(asking, name) for name in ("tiny", *names)}
    with client(tmp_path / "m", lora_directory=str(tmp_path / "a")) as asking:
        for name in names:
            changed(asking, LOAD, lora_name=name, lora_path=str(tmp_path / "a" / name))
            assert scores(asking, name) == pytest.approx(wanted[name], abs=1e-4)
        assert asking.served.adapters == names and scores(asking, "tiny") == pytest.approx(wanted["tiny"], abs=1e-4)
        changed(asking, UNLOAD, lora_name="one")
        assert asking.served.adapters == ("two",)
        asking.bad(status=404, model="one")
        assert scores(asking, "two") == pytest.approx(wanted["two"], abs=1e-4)
        changed(asking, LOAD, lora_name="one", lora_path=str(tmp_path / "a" / "two"))
        assert scores(asking, "one") == pytest.approx(wanted["two"], abs=1e-4)
        assert wanted["two"] != pytest.approx(wanted["one"], abs=1e-2) and len(wanted["one"]) > 4


def test_what_may_not_be_loaded_is_refused(root: Path, tmp_path: Path):
    model = opened(root / "m")
    with client(root / "m", model) as asking:
        for path, fields in ((LOAD, {"lora_path": str(root / "sql")}), (UNLOAD, {})):
            assert "lora_directory" in refused(asking, path, 403, lora_name="sql", **fields)
    (root / "inside").mkdir()
    (root / "inside" / "link").symlink_to(root / "sql")
    with client(root / "m", model, lora_directory=str(root / "inside")) as asking:
        for outside in (str(root / "sql"), f"{root}/inside/../sql", f"{root}/inside/link", "/"):
            assert "not below lora_directory" in refused(asking, LOAD, 403, lora_name="a", lora_path=outside)
        for nowhere in (f"{root}/inside/nowhere", f"{root}/inside/\0", f"{root}/inside/" + "x" * 5000):
            assert "no such directory" in refused(asking, LOAD, 404, lora_name="a", lora_path=nowhere)
        assert "there is no adapter" in refused(asking, UNLOAD, 404, lora_name="a")
    with client(root / "m", model, lora_directory=str(root)) as asking:
        assert "expected a name" in refused(asking, LOAD, 400, lora_name="", lora_path=str(root / "sql"))
        assert "holds no adapter" in refused(asking, LOAD, 400, lora_name="a", lora_path=str(root / "m"))
        assert "a model of this name" in refused(asking, LOAD, 400, lora_name="tiny", lora_path=str(root / "sql"))
        changed(asking, LOAD, lora_name="sql", lora_path=str(root / "sql"))
        assert "Unload it first" in refused(asking, LOAD, 400, lora_name="sql", lora_path=str(root / "sql"))


def test_a_directory_that_is_not_there_yet_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture):
    """A training may make it while the server runs."""
    with client(root / "m", lora_directory=str(root / "later")):
        assert f"lora_directory: there is no directory {root}/later; adapters can be loaded once" in caplog.text


def test_an_adapter_that_two_requests_unload_is_unloaded_once(root: Path):
    """Both come while the engine is busy."""
    with client(root / "m", lora_modules=[f"sql={root / 'sql'}"], lora_directory=str(root)) as asking:
        busy, thread = threading.Event(), asking.served.thread
        thread._call(lambda: busy.wait(30))
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(asking.http.post, UNLOAD, json={"lora_name": "sql"}) for _ in range(2)]
            while len(thread._calls) < 2:
                time.sleep(0.01)
            busy.set()
            assert sorted(answer.result().status_code for answer in answers) == [200, 404]


def test_an_adapter_in_use_stays(root: Path):
    model = opened(root / "m", lora_modules=[f"sql={root / 'sql'}"])
    engine = Engine(model.model, num_kept=2)
    generation = engine.add(Request([5, 9, 33], Limits(3), Sampling(), adapter="sql"))
    with pytest.raises(UserError, match="answers with this adapter are being generated"):
        engine.forget_adapter("sql")
    while not generation.answer.stop:
        engine.step()
    assert len(engine._kept) == 1
    engine.forget_adapter("sql")
    assert not engine._kept


def test_ids_have_the_scores_of_all_tokens_and_may_stand_for_their_texts(server: Asking):
    asked = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0, "temperature": 1, "seed": 3}
    stop = server.complete(**asked)["choices"][0]["token_ids"][2]
    whole = server.complete(**asked, stop_token_ids=[stop])["choices"][0]
    assert whole["finish_reason"] == "stop" and whole["token_ids"][-1] == stop
    assert whole["logprobs"]["tokens"] == [f"token_id:{number}" for number in whole["token_ids"]]
    assert len(whole["logprobs"]["token_logprobs"]) == len(whole["token_ids"])
    chunks = server.stream(COMPLETIONS, **asked, stop_token_ids=[stop])
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [each for part in parts for each in part["logprobs"]["token_logprobs"]] == whole["logprobs"][
        "token_logprobs"
    ]
    plain = server.complete(**asked | {"return_token_ids": False}, stop_token_ids=[stop])["choices"][0]
    assert len(plain["logprobs"]["tokens"]) == len(whole["token_ids"]) - 1, "the end token has no text"
