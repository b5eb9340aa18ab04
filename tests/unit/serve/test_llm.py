"""`erniekit.LLM` gives the tokens of the engine and the answers of the server."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.adapters import attach_random
from support.tiny_directories import model_directory
from support.tiny_server import QUESTION, client
from support.vision_directories import vision_model_directory

import erniekit
from erniekit import LLM, SamplingParams
from erniekit.build import load_model
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.generation import prompt_scores
from erniekit.generation.engine import Engine
from erniekit.generation.guided import GrammarState
from erniekit.generation.request import Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.utils.errors import CheckpointError, UserError

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(model=model_dir, dtype="float32", max_num_seqs=3)


def engines(llm: LLM, prompt: list[int], sampling: Sampling, draw: int = 0, tokens: int = 6) -> list[int]:
    model = llm.chat_model
    engine = Engine(model.model)
    limits = Limits(tokens, stop_ids=tuple({*model.template.stop_ids, *model.model.end_ids}))
    answer = engine.add(Request(prompt, limits, sampling, draw)).answer
    while not answer.stop:
        engine.step()
    return answer.all_ids


def test_prompts_of_every_form_get_the_tokens_of_the_engine(llm: LLM):
    texts = ["25加16", "等于", "41"]
    ids = [llm.get_tokenizer().encode(text) for text in texts]
    wanted = [engines(llm, row, Sampling()) for row in ids]
    for prompts in (texts, ids, [{"prompt": texts[0]}, {"prompt_token_ids": ids[1]}, tuple(ids[2])]):
        results = llm.generate(prompts, GREEDY)
        assert [result.outputs[0].token_ids for result in results] == wanted
        assert [result.prompt_token_ids for result in results] == ids
    assert llm.generate(texts[0], GREEDY)[0].outputs[0].token_ids == wanted[0]
    assert llm.generate(ids[0], GREEDY)[0].prompt is None
    assert len({result.request_id for result in llm.generate(texts)}) == 3
    assert [len(result.outputs[0].token_ids) for result in llm.generate(texts, SamplingParams(ignore_eos=True))] == (
        [16] * 3
    ), "vLLM's default of max_tokens"


def test_each_prompt_may_have_settings_of_its_own(llm: LLM):
    ids = llm.get_tokenizer().encode("25加16")
    drawn = SamplingParams(n=3, temperature=1.2, top_p=0.9, min_p=0.01, seed=7, max_tokens=6)
    results = llm.generate([ids, ids], [GREEDY, drawn])
    assert results[0].outputs[0].token_ids == engines(llm, ids, Sampling())
    sampling = Sampling(1.2, 0, 0.9, seed=7, min_p=0.01)
    assert [output.token_ids for output in results[1].outputs] == [engines(llm, ids, sampling, i) for i in range(3)]
    assert [output.index for output in results[1].outputs] == [0, 1, 2]


def test_scores_are_those_of_the_model(llm: LLM):
    ids = llm.get_tokenizer().encode("25加16等于")
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=4, logprobs=2, prompt_logprobs=1)
    (result,) = llm.generate([ids], params)
    output = result.outputs[0]
    rows = llm.chat_model.model(np.array([[*ids, *output.token_ids]])).numpy()[0].astype(np.float64)
    rows -= np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) + rows.max(-1, keepdims=True)
    assert output.logprobs is not None and result.prompt_logprobs is not None
    # fp32 matrix products of other shapes: a few ulp of scores near 10
    for place, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert entry[token].logprob == pytest.approx(rows[len(ids) - 1 + place, token], abs=1e-5)
        assert len(entry) in (2, 3) and min(rank for e in entry.values() if (rank := e.rank)) == 1
    assert output.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs))
    )
    assert result.prompt_logprobs[0] is None
    assert result.prompt_logprobs[2][ids[2]].logprob == pytest.approx(rows[1, ids[2]], abs=1e-5)


def test_scores_of_a_prompt_take_the_memory_of_a_piece(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    ids, model = llm.get_tokenizer().encode("25加16等于41，3加4等于7"), llm.chat_model.model
    whole = prompt_scores.score_prompt(model, ids, 1)
    head, sizes = model.head, []

    def counted(hidden_TD):
        sizes.append(hidden_TD.shape[0])
        return head(hidden_TD)

    monkeypatch.setattr(model, "head", counted)
    monkeypatch.setattr(prompt_scores, "_PIECE", 4)
    in_pieces = prompt_scores.score_prompt(model, ids, 1)
    assert max(sizes) <= 4 and sum(sizes) == len(ids) - 1
    assert whole[0] is None and in_pieces[0] is None
    for one, other in zip(whole[1:], in_pieces[1:], strict=True):
        assert one is not None and other is not None
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5) and other.top[0][0] == one.top[0][0]


def test_chat_answers_as_the_server(llm: LLM, model_dir: Path):
    params = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=8, stop=["a", "e"])
    (result,) = llm.chat(QUESTION, params)
    with client(model_dir, llm.chat_model) as server:
        said = server.chat(temperature=1.0, top_p=1.0, seed=5, n=2, stop=["a", "e"])["choices"]
    assert [output.text for output in result.outputs] == [choice["message"]["content"] or "" for choice in said]
    assert [output.finish_reason for output in result.outputs] == [choice["finish_reason"] for choice in said]
    assert [output.stop_reason for output in result.outputs] == [choice["stop_reason"] for choice in said]
    talks = [QUESTION, [{"role": "user", "content": "你好"}]]
    assert [r.outputs[0].token_ids for r in llm.chat(talks, GREEDY)] == [
        llm.chat(talk, GREEDY)[0].outputs[0].token_ids for talk in talks
    ]
    again = llm.chat(QUESTION, GREEDY)[0]
    assert again.num_cached_tokens == len(again.prompt_token_ids) - 1


def test_thoughts_and_calls_are_taken_out_of_the_text(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    from erniekit.generation import choosing

    model = llm.chat_model
    text = '<think>\nhm\n</think>\n\nyes <tool_call>\n{"name": "f", "arguments": {"a":  1}}\n</tool_call>'
    ids = [*model.tokenizer.encode(text), model.template.stop_ids[0]]

    def fill(table, scores, rows) -> None:
        for line, row in zip(table, rows, strict=True):
            line[0] = ids[len(row.answer.ids)]

    monkeypatch.setattr(choosing, "_fill", fill)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    long = SamplingParams(max_tokens=200)
    if "tools" not in model.template.source:
        with pytest.raises(UserError, match="tools"):
            llm.chat(QUESTION, long, tools=tools)
    (result,) = llm.chat(QUESTION, long)
    assert result.outputs[0].reasoning_content == "hm"
    assert result.outputs[0].text.startswith("yes")


def test_pictures_come_from_memory_and_from_files(tmp_path: Path):
    llm = LLM(vision_model_directory(tmp_path / "vl", weights=True, max_pixels=84 * 84), dtype="float32")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "a b.png")
    text = {"type": "text", "text": "12?"}

    def ask(part: dict) -> object:
        (result,) = llm.chat([{"role": "user", "content": [part, text]}], GREEDY)
        return result.prompt_token_ids, result.outputs[0].token_ids

    given = ask({"type": "image_pil", "image_pil": image})
    assert given == ask({"type": "image_url", "image_url": {"url": (tmp_path / "a b.png").as_uri()}})
    in_ink = image.convert("CMYK")  # which no PNG file holds
    in_ink.save(tmp_path / "ink.jpg", quality=100)
    ask({"type": "image_pil", "image_pil": in_ink})
    assert ask({"type": "image_pil", "image_pil": Image.open(tmp_path / "ink.jpg")}) == ask(
        {"type": "image_url", "image_url": {"url": (tmp_path / "ink.jpg").as_uri()}}
    )
    with pytest.raises(UserError, match=r"image_pil: .*floating-point"):
        ask({"type": "image_pil", "image_pil": image.convert("F")})
    with pytest.raises(UserError, match="cannot read"):
        ask({"type": "image_url", "image_url": {"url": "file:///nowhere/a.png"}})
    with pytest.raises(UserError, match="opens no addresses"):
        ask({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})
    with pytest.raises(UserError, match=r"PIL\.Image\.Image"):
        ask({"type": "image_pil", "image_pil": 5})


def test_an_adapters_directory_is_used_with_its_base(model_dir: Path, llm: LLM, tmp_path: Path):
    model = attach_random(load_model(model_dir))
    save_adapter(model, tmp_path / "adapter")
    adapted = LLM(model=tmp_path / "adapter", model_name_or_path=str(model_dir), dtype="float32")
    ids = adapted.get_tokenizer().encode("25加16")
    found = adapted.generate([ids], GREEDY)[0].outputs[0].token_ids
    assert found == engines(adapted, ids, Sampling()) != llm.generate([ids], GREEDY)[0].outputs[0].token_ids
    model.eval()
    engine = Engine(model)
    answer = engine.add(Request(ids, Limits(6), Sampling())).answer
    while not answer.stop:
        engine.step()
    assert found == answer.ids


def test_drafts_leave_the_answers_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = model_directory(tmp_path / "m", num_nextn_predict_layers=1)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=9, n=2, stop=["a"])
    plain, drafting = (
        LLM(path, dtype="float32", num_speculative_tokens=number).generate(["25加16", "等于"], params)
        for number in (0, 1)
    )
    assert [result.outputs for result in drafting] == [result.outputs for result in plain]
    assert "were right" in capsys.readouterr().err
    with client(path, num_speculative_tokens=1) as server:
        said = server.complete(prompt="25加16", temperature=1.0, top_p=1.0, seed=3, max_tokens=9, n=2, stop=["a"])
        metrics = server.http.get("/metrics").text
    assert [choice["text"] for choice in said["choices"]] == [output.text for output in plain[0].outputs]
    assert "erniekit:spec_decode_num_draft_tokens_total" in metrics
    monkeypatch.setattr("erniekit.generation.load.PreparedChatModel.load", lambda self: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="num_speculative_tokens: the model has no block"):
        LLM(model_directory(tmp_path / "plain"), dtype="float32", num_speculative_tokens=1)


def test_an_interrupted_call_leaves_the_engine_free(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    step, count = Engine.step, [0]

    def interrupt(self: Engine) -> object:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["25加16", "等于"], GREEDY)
    assert llm._engine.is_idle
    assert llm.generate("等于", GREEDY)[0].outputs[0].token_ids == engines(
        llm, llm.get_tokenizer().encode("等于"), Sampling()
    )


def test_bytes_are_no_token_ids(llm: LLM):
    with pytest.raises(UserError, match="prompts: expected a text or token ids, got bytes"):
        llm.generate(b"hi", GREEDY)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temprature": 1}, "did you mean temperature"),
        ({"top_p": -0.5}, "top_p: expected 0 or more"),
        ({"temperature": "hot"}, "temperature: expected number"),
        ({"n": 0}, "n: expected 1 or more"),
        ({"logprobs": 99}, "logprobs: expected at most 20"),
        ({"stop": [""]}, "stop: each text"),
        ({"use_beam_search": True}, "no such argument"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: expected a number, got nan"),
        ({"min_p": float("nan")}, "min_p: expected a number"),
        ({"logit_bias": [5]}, "logit_bias: expected .*got list"),
    ],
)
def test_wrong_sampling_params_are_refused(values: dict, said: str):
    with pytest.raises(UserError, match=said):
        SamplingParams(**values)


def test_wrong_calls_are_refused(llm: LLM, model_dir: Path):
    for call, said in (
        (lambda: LLM(model=model_dir, max_num_seq=3), "did you mean max_num_seqs"),
        (lambda: LLM(model=model_dir, tensor_parallel_size=2), "tensor_parallel_size"),
        (lambda: LLM(model="/nowhere/m"), "there is no file or directory"),
        (lambda: LLM(model=model_dir, max_model_len=10**6), "more than the model's context"),
        (lambda: llm.generate(5), "expected a text, token ids or a list"),
        (lambda: llm.generate([[10**9]]), "outside the vocabulary"),
        (lambda: llm.generate([[1, 2.5]]), "expected token ids"),
        (lambda: llm.generate(""), "no tokens"),
        (lambda: llm.generate({"prompt": "a", "multi_modal_data": {}}), "`chat` takes pictures"),
        (lambda: llm.generate("a", [GREEDY] * 2), "got 2 for 1 prompt"),
        (lambda: llm.generate("a", SamplingParams(logit_bias={10**8: 1})), "is not a token id"),
        (lambda: llm.chat([{"role": "robot", "content": "a"}]), "expected system"),
        (lambda: llm.chat(QUESTION, tool_choice="auto"), "no tools"),
        (lambda: llm.chat(QUESTION, chat_template_kwargs={"tokenise": 1}), "unknown field"),
        (lambda: llm.chat(QUESTION, SamplingParams(prompt_logprobs=1)), "prompt_logprobs"),
    ):
        with pytest.raises((UserError, CheckpointError), match=said):
            call()


def test_the_class_needs_no_web_server_and_comes_on_first_use():
    names = "('paddle', 'starlette', 'uvicorn', 'prometheus_client')"
    code = (
        f"import sys, erniekit; assert 'paddle' not in sys.modules; erniekit.LLM; "
        f"print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['paddle']"
    assert {"LLM", "SamplingParams"} <= set(dir(erniekit))


@pytest.mark.parametrize("score", [None, 1])
def test_an_answer_that_fails_leaves_the_others(model_dir: Path, tmp_path: Path, score: int | None):
    directory = model_directory(tmp_path / "m", tie_word_embeddings=False)
    llm = LLM(directory, dtype="float32")
    weight, (bad, *_) = llm.chat_model.model.model.embed_tokens.weight, llm.get_tokenizer().encode("x")
    values = weight.numpy()
    values[bad] = np.nan
    weight.set_value(values)
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[bad], logprobs=score)
    (alone,) = llm.generate("25加16", params)
    failed, good = llm.generate([[bad], "25加16"], params)
    assert (failed.outputs[0].finish_reason, failed.outputs[0].token_ids) == ("error", [])
    assert failed.outputs[0].error and "not finite" in failed.outputs[0].error
    scored = llm.generate([[bad, bad], "25加16"], replace(params, prompt_logprobs=0))
    assert scored[0].prompt_logprobs is None and scored[1].prompt_logprobs is not None
    assert good.outputs[0].token_ids == alone.outputs[0].token_ids and good.outputs[0].error is None
    with pytest.raises(UserError, match=r"every answer has failed: .*not finite"):
        llm.generate([[bad]], params)


def test_a_grammar_that_goes_no_further_fails_alone(llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    monkeypatch.setattr(GrammarState, "__call__", _stuck)
    guided = SamplingParams(temperature=0, max_tokens=6, structured_outputs={"regex": "[a-c]{4}"})
    stuck, good = llm.generate(["a", "25加16"], [guided, GREEDY])
    assert stuck.outputs[0].finish_reason == "error" and stuck.outputs[0].stop_reason is None
    assert stuck.outputs[0].error == "the answer cannot follow its grammar further: too many states"
    assert good.outputs == llm.generate("25加16", GREEDY)[0].outputs
    assert 'warning: 1 of 2 answers failed (finish_reason "error"): the answer cannot' in caplog.text
    with pytest.raises(UserError, match="every answer has failed: the answer cannot follow its grammar"):
        llm.generate("a", guided)


def _stuck(state: GrammarState, ids: list[int]) -> np.ndarray:
    """A grammar that has come to a bound of llguidance."""
    state.error = "too many states"
    mask = np.zeros(state.vocab_size, bool)
    mask[list(state.stop_ids)] = True
    return mask
