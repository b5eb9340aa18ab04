"""What a server answers: equal to the engine's tokens, whole and in pieces."""

from pathlib import Path

import numpy as np
import pytest
from support.tiny_directories import model_directory
from support.tiny_server import CHAT, COMPLETIONS, QUESTION, Asking, client, joined, opened, rigged

from erniekit.data.chat.tokenizer import StreamDecoder
from erniekit.generation.engine import Engine
from erniekit.generation.load import ChatModel
from erniekit.generation.request import Event, Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.serve.server_text import AnswerReader, Reading, StopTexts, hidden_ids
from erniekit.utils import log

GREEDY = Sampling()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ChatModel:
    return opened(model_dir)


@pytest.fixture(scope="module")
def server(model_dir: Path, model: ChatModel):
    with client(model_dir, model) as asking:
        yield asking


def expected(model: ChatModel, ids: list[int], tokens: int = 8, sampling: Sampling = GREEDY, draw: int = 0) -> str:
    """What the engine alone says."""
    engine = Engine(model.model)
    answer = engine.add(Request(ids, Limits(tokens, stop_ids=tuple(model.template.stop_ids)), sampling, draw)).answer
    while not answer.stop:
        engine.step()
    # one id after another: decoded together, a letter among stray bytes would be one of them
    decoder, hidden = StreamDecoder(model.tokenizer), hidden_ids(model.tokenizer)
    return "".join([*(decoder.push(i) for i in answer.ids if i not in hidden), decoder.flush()])


def test_an_answer_is_the_engines_and_a_stream_is_the_answer(server: Asking, model: ChatModel):
    text = expected(model, model.template.prompt_ids(QUESTION))
    whole = server.chat()
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] == "length"
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny" and whole["id"].startswith("chatcmpl-")
    prompt = len(model.template.prompt_ids(QUESTION))
    counts = {name: whole["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")}
    assert counts == {"prompt": prompt, "completion": 8, "total": prompt + 8}
    chunks = server.stream(stream_options={"include_usage": True})
    said = joined(chunks)
    assert (said["role"], said["content"], said["finish_reason"]) == ("assistant", text, "length")
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_request_that_names_no_model_is_answered_by_the_served_one(server: Asking):
    named, unnamed = server.chat(), server.chat(model=None)
    assert unnamed["model"] == "tiny" and unnamed["choices"] == named["choices"]
    answer = server.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "echo": True, "logprobs": 1})
    assert answer.status_code == 200 and answer.json()["model"] == "tiny"


def test_top_p_0_takes_the_likeliest_token(server: Asking):
    """Clients send it, since OpenAI's API takes it."""
    greedy = server.chat(temperature=0)["choices"][0]["message"]["content"]
    for seed in range(3):
        assert server.chat(temperature=1.5, top_p=0, seed=seed)["choices"][0]["message"]["content"] == greedy


def test_seeds_and_several_answers(server: Asking, model: ChatModel):
    drawn = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 3}
    ids = model.template.prompt_ids(QUESTION)
    wanted = [expected(model, ids, 8, Sampling(1.2, 0, 0.9, seed=7), draw) for draw in range(3)]
    assert len(set(wanted)) > 1
    assert [choice["message"]["content"] for choice in server.chat(**drawn)["choices"]] == wanted
    chunks = server.stream(**drawn)
    assert [joined(chunks, index)["content"] for index in range(3)] == wanted
    begun = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert begun == [0, 1, 2], "clients make a list of the choices in this order"
    assert server.chat(seed=-3, temperature=1.0)["choices"] == server.chat(seed=-3, temperature=1.0)["choices"]


def test_log_probabilities_are_those_of_the_model(server: Asking, model: ChatModel):
    choice = server.chat(logprobs=True, top_logprobs=3, temperature=0.5, seed=1)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 8 and all(len(entry["top_logprobs"]) == 3 for entry in entries)
    scores = model.model(np.array([model.template.prompt_ids(QUESTION)])).numpy()[0, -1].astype(np.float64)
    logprobs = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    top = [entry["logprob"] for entry in entries[0]["top_logprobs"]]
    # fp32 matrix products of other shapes: a few ulp of scores near 10
    np.testing.assert_allclose(top, np.sort(logprobs)[::-1][:3], atol=1e-5)
    streamed = server.stream(logprobs=True, top_logprobs=3, temperature=0.5, seed=1)
    parts = [c["choices"][0]["logprobs"] for c in streamed]
    assert [entry for part in parts if part for entry in part["content"]] == entries
    for entry in entries:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"] or len(entry["bytes"]) == 1


def test_completions_continue_texts_and_ids(server: Asking, model: ChatModel):
    ids = [model.tokenizer.encode(text) for text in ("25加16", "等于")]
    texts = [expected(model, row) for row in ids]
    for prompt in (["25加16", "等于"], ids):
        answer = server.complete(prompt=prompt)
        assert [choice["text"] for choice in answer["choices"]] == texts and answer["object"] == "text_completion"
    assert server.complete(prompt=ids[0])["choices"][0]["text"] == texts[0]
    chunks = server.stream(COMPLETIONS, prompt=ids, echo=True)
    for index, text in enumerate(texts):
        said = "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index)
        assert said == model.tokenizer.decode(ids[index]) + text


def test_the_log_likelihood_of_a_prompt_as_lm_eval_asks_for_it(server: Asking, model: ChatModel):
    ids = model.tokenizer.encode("25加16等于41")
    scores = model.model(np.array([ids])).numpy()[0].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    for tokens in (1, 0):
        answer = server.complete(prompt=[ids], echo=True, logprobs=1, max_tokens=tokens, temperature=0, seed=1234)
        found = answer["choices"][0]["logprobs"]
        assert len(found["tokens"]) == len(ids) + tokens == len(found["token_logprobs"]) == len(found["text_offset"])
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        wanted = [scores[i, token] for i, token in enumerate(ids[1:])]
        np.testing.assert_allclose(found["token_logprobs"][1 : len(ids)], wanted, atol=1e-5)
        for row, top in zip(scores, found["top_logprobs"][1 : len(ids)], strict=False):
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-5)


def test_a_prompt_that_is_scored_alone_may_fill_the_context(model_dir: Path, model: ChatModel):
    with client(model_dir, model, max_model_len=16) as asking:
        ask = {"echo": True, "logprobs": 0, "max_tokens": 0, "return_token_ids": True}
        (choice,) = asking.complete(prompt=[5] * 16, **ask)["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == 16
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5] * 16, [])
        assert "17 tokens: the context is 16" in asking.bad(COMPLETIONS, prompt=[5] * 17, **ask)["message"]
        assert "no room for an answer" in asking.bad(COMPLETIONS, prompt=[5] * 16)["message"]


@pytest.mark.parametrize("echo", [True, False])
def test_offsets_are_places_in_the_text(server: Asking, echo: bool):
    """Characters of several tokens count once, and the text that a stop text holds back counts where it stands."""
    ask = {
        "prompt": "龘a😀 b",
        "echo": echo,
        "logprobs": 0,
        "temperature": 2,
        "max_tokens": 24,
        "stop": ["nez", "\ufffdq"],
    }
    for seed in range(4):
        (choice,) = server.complete(**ask, seed=seed)["choices"]
        found = choice["logprobs"]
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            is_cut = offset + len(token) > len(choice["text"])  # by a stop text
            if len(token) > 1 and not token.startswith("<") and not is_cut:  # no byte, and no special token
                assert choice["text"].startswith(token, offset), (token, offset)
        streamed = [chunk["choices"][0]["logprobs"] for chunk in server.stream(COMPLETIONS, **ask, seed=seed)]
        assert [offset for part in streamed for offset in part["text_offset"]] == found["text_offset"]
        assert [token for part in streamed for token in part["tokens"]] == found["tokens"]


def test_biases_and_ids_of_tokens(server: Asking, model: ChatModel):
    forced = model.tokenizer.encode("数")[0]
    biased = {"logit_bias": {str(forced): 100}, "return_token_ids": True, "max_tokens": 3}
    whole = server.chat(**biased)
    prompt = model.template.prompt_ids(QUESTION)
    assert whole["choices"][0]["token_ids"] == [forced] * 3 and whole["prompt_token_ids"] == prompt
    chunks = server.stream(**biased)
    assert chunks[0]["prompt_token_ids"] == prompt
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == [forced] * 3
    answer = server.complete(prompt=[prompt], **biased)["choices"][0]
    assert (answer["token_ids"], answer["prompt_token_ids"]) == ([forced] * 3, prompt)
    chunks = server.stream(COMPLETIONS, prompt=[prompt], **biased)
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == [forced] * 3
    assert chunks[0]["choices"][0]["prompt_token_ids"] == prompt


def test_likely_tokens_of_one_text_are_told_apart_by_their_ids(server: Asking):
    """Bytes of characters all have the text U+FFFD, of which an object has one."""
    ask = {"prompt": "25加16", "max_tokens": 6, "logprobs": 20}
    texts = server.complete(**ask)["choices"][0]["logprobs"]
    ids = server.complete(**ask, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert min(map(len, texts["top_logprobs"])) < 20
    assert all(len(top) == 20 and all(name.startswith("token_id:") for name in top) for top in ids["top_logprobs"])
    assert all(name in top for name, top in zip(ids["tokens"], ids["top_logprobs"], strict=True))
    assert ids["text_offset"] == texts["text_offset"]


def test_what_a_server_measures(model_dir: Path, model: ChatModel):
    with client(model_dir, model) as asking:
        asking.chat(n=2, max_tokens=3)
        lines = asking.http.get("/metrics").text.splitlines()
    values = {line.partition("{")[0]: float(line.split()[-1]) for line in lines if 'le="' not in line and "{" in line}
    for name in ("queue", "prefill", "decode", "inference"):
        assert values[f"erniekit:request_{name}_time_seconds_count"] == 2
    parts = [values[f"erniekit:request_{name}_time_seconds_sum"] for name in ("queue", "inference")]
    assert sum(parts) == pytest.approx(values["erniekit:e2e_request_latency_seconds_sum"], rel=1e-6)
    assert values["erniekit:kv_cache_usage_perc"] == 0, "nothing runs"
    assert values["erniekit:generation_tokens_total"] == 6
    assert "erniekit:spec_decode_num_draft_tokens_total" not in values


def test_limits_are_honoured(server: Asking, model: ChatModel):
    text = server.chat()["choices"][0]["message"]["content"]
    stop = text[2:5]
    stopped = server.chat(stop=stop)["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[:2], "stop")
    assert stopped["stop_reason"] == stop
    assert server.chat(stop=[stop], include_stop_str_in_output=True)["choices"][0]["message"]["content"] == text[:5]
    ids = model.tokenizer.encode(text)
    first = server.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert server.chat(max_completion_tokens=3, max_tokens=8)["usage"]["completion_tokens"] == 3
    assert len(first) == 8 and ids
    ended = server.chat(stop_token_ids=list(range(model.model.config.vocab_size)))["choices"][0]
    assert ended["message"]["content"] == "" and ended["finish_reason"] == "stop"
    assert server.chat(stop_token_ids=list(range(300)), min_tokens=4)["usage"]["completion_tokens"] >= 4


@pytest.mark.parametrize("of_yaml", [False, True], ids=["request", "yaml"])
def test_a_stop_text_within_the_first_min_tokens_ends_nothing(
    model_dir: Path, model: ChatModel, of_yaml: bool, monkeypatch: pytest.MonkeyPatch
):
    assert len(model.tokenizer.encode("axbxc")) == 5
    for least, text in ((0, "a"), (1, "a"), (2, "axb"), (3, "axb"), (4, "axbxc")):
        with client(model_dir, model, min_tokens=least if of_yaml else 4) as server:
            fields = {"stop": "x"} | ({} if of_yaml else {"min_tokens": least})
            with rigged(monkeypatch, server.served, "axbxc"):
                assert server.complete(**fields)["choices"][0]["text"] == text
                assert server.chat(**fields)["choices"][0]["message"]["content"] == text


def test_odd_settings_of_one_request_do_not_end_the_engine(server: Asking):
    greedy = server.complete(temperature=0)["choices"][0]["text"]
    for temperature in (1e-38, 1e-50):
        for more in ({}, {"top_p": 0.5}, {"logprobs": 2}):
            assert server.complete(temperature=temperature, seed=1, **more)["choices"][0]["text"] == greedy
    for penalty in (1e-300, 1e-45, 100):
        assert server.complete(temperature=1e-38, repetition_penalty=penalty)["choices"][0]["finish_reason"]
    every = list(range(server.served.chat_model.model.config.vocab_size))
    for more in ({}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}):
        ended = server.complete(temperature=1.0, stop_token_ids=every, min_tokens=2, **more)["choices"][0]
        assert ended["finish_reason"] == "stop", "every token is an end token, and all of them are banned"
    assert server.complete(temperature=0)["choices"][0]["text"] == greedy


def test_max_tokens_beyond_the_context_are_lowered_and_the_response_says_so(server: Asking, model: ChatModel):
    with client(server.served.chat_model.path, model, max_model_len=32) as small:
        answer = small.http.post(CHAT, json={"model": "tiny", "messages": QUESTION, "max_tokens": 65535})
        used = answer.json()["usage"]
        assert answer.headers["x-erniekit-max-tokens"] == str(32 - used["prompt_tokens"])
        assert used["total_tokens"] == 32
        assert small.chat(max_tokens=None)["usage"]["total_tokens"] == 32


def test_a_long_prompt_does_not_shorten_the_answers_to_others(server: Asking, model: ChatModel):
    with client(server.served.chat_model.path, model, max_model_len=32) as small:
        body = {"model": "tiny", "prompt": [[7] * 30, [7]], "max_tokens": 16, "ignore_eos": True}
        answer = small.http.post(COMPLETIONS, json=body | {"return_token_ids": True})
        assert [len(choice["token_ids"]) for choice in answer.json()["choices"]] == [2, 16]
        assert answer.headers["x-erniekit-max-tokens"] == "2"
        whole = small.complete(prompt=[[7] * 30, [7]], max_tokens=None, ignore_eos=True, return_token_ids=True)
        assert [len(choice["token_ids"]) for choice in whole["choices"]] == [2, 31]


CALL = '<tool_call>\n{"name": "add", "arguments": {"a":  1, "t": "</tool_call>"}}\n</tool_call>\n'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def read(model: ChatModel, text: str, **how: object) -> tuple[str, str, list[str], str | None]:
    """(thought, text, arguments of the calls, why it ended) of what a model says."""
    reader = AnswerReader(model.tokenizer, Reading(**how))
    said: dict[str, list[str]] = {"thought": [], "text": [], "call": []}
    for event in [*map(Event, model.tokenizer.encode(text)), Event(stop="stop", stop_id=2)]:
        for piece in reader.push(event):
            said[piece.kind].append(piece.call.arguments if piece.call else piece.text)
        if reader.is_over:
            break
    return "".join(said["thought"]), "".join(said["text"]), said["call"], reader.finish_reason


def test_thoughts_calls_and_stop_texts_are_taken_apart(model: ChatModel):
    framed = "why\n</think>\n\n<response>\nso <b>\n</response>\n"
    assert read(model, framed, opened=True) == ("why", "so <b>", [], "stop")
    assert read(model, f"<think>{framed}") == ("why", "so <b>", [], "stop")
    arguments = '{"a":  1, "t": "</tool_call>"}'
    assert read(model, f"好\n{CALL}{CALL}", has_calls=True) == ("", "好", [arguments] * 2, "tool_calls")
    assert read(model, CALL) == ("", CALL, [], "stop"), "no tools were offered"
    assert read(model, f"<think>{CALL}</think>a", has_calls=True) == (CALL.strip(), "a", [], "stop")
    broken = "<tool_call>{]</tool_call>"
    assert read(model, broken, has_calls=True) == ("", broken, [], "stop")
    assert read(model, "<think>a b</think>c b d", stops=(" b",)) == ("a b", "c", [], "stop")
    assert read(model, "never ends", opened=True) == ("never ends", "", [], "stop")


def test_a_client_gets_thought_text_and_call_once_each(server: Asking, monkeypatch: pytest.MonkeyPatch):
    text = '<think>a</think>b\n<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    with rigged(monkeypatch, server.served, text):
        choice = server.chat(max_tokens=99, tools=TOOLS)["choices"][0]
        streamed = joined(server.stream(max_tokens=99, tools=TOOLS, parallel_tool_calls=False))
    whole = choice["message"] | {"finish_reason": choice["finish_reason"]}
    ids = [message["tool_calls"][0].pop("id") for message in (whole, streamed)]
    assert all(name.startswith("chatcmpl-tool-") for name in ids)
    assert streamed["tool_calls"][0].pop("index") == 0
    assert whole == streamed
    assert whole["reasoning"] == whole["reasoning_content"] == "a" and whole["content"] == "b"
    function = {"name": "add", "arguments": '{"x": 1}'}
    assert whole["tool_calls"] == [{"type": "function", "function": function}]
    assert whole["finish_reason"] == "tool_calls"


def test_history_comes_back_as_it_was_written(server: Asking):
    history = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [
                {"id": name, "type": "function", "function": {"name": "add", "arguments": '{"a":  1}'}}
                for name in ("x", "y")
            ],
        },
        {"role": "tool", "tool_call_id": "y", "content": [{"type": "text", "text": "second"}]},
        {"role": "tool", "tool_call_id": "x", "content": "first </think>"},
    ]
    tokens = server.good("/tokenize", {"messages": history, "tools": TOOLS})["tokens"]
    text = server.good("/detokenize", {"tokens": tokens})["prompt"]
    assert '"arguments": {"a":  1}' in text and text.index("first </think>") < text.index("second")
    assert (
        server.good("/tokenize", {"messages": [{"role": "developer", "content": "s"}, *QUESTION]})["tokens"]
        == (server.good("/tokenize", {"messages": [{"role": "system", "content": "s"}, *QUESTION]})["tokens"])
    )


def test_an_answer_that_was_cut_off_in_its_thought_may_be_sent_back(server: Asking, monkeypatch: pytest.MonkeyPatch):
    with rigged(monkeypatch, server.served, "<think>hm hm hm hm"):
        (choice,) = server.chat(max_tokens=3)["choices"]
    message = choice["message"]
    assert message["content"] is None and message["reasoning"] and choice["finish_reason"] == "length"
    assert server.chat(messages=[*QUESTION, message, *QUESTION], max_tokens=1)["choices"]


def test_what_cannot_change_the_answer_is_ignored_and_neutral_values_pass(server: Asking):
    plain = server.chat()["choices"]
    harmless = {"user": "u", "store": True, "metadata": {"a": 1}, "service_tier": "auto", "verbosity": "low"}
    neutral = {"n": 1, "tools": None, "logprobs": False, "logit_bias": {}, "presence_penalty": 0, "min_p": 0}
    neutral |= {"modalities": ["text"], "response_format": {"type": "text"}, "stop": None, "stream_options": None}
    assert server.chat(**harmless, **neutral)["choices"] == plain


@pytest.mark.parametrize("text", ["abcXYdef", "abXcX", "abcX", "XYXY", "aXYb"])
def test_stop_texts_are_found_however_the_text_is_cut(text: str):
    for at in range(len(text) + 1):
        stops = StopTexts(["XY", "Z"])
        said = stops.push(text[:at])
        said += "" if stops.found else stops.push(text[at:])
        said += "" if stops.found else stops.flush()
        assert said == text.partition("XY")[0] and bool(stops.found) == ("XY" in text)


def test_half_a_character_at_the_end_is_shown_once(model: ChatModel):
    ids = [model.tokenizer.token_id(f"<0x{byte:02X}>") for byte in "加".encode()]
    for count, shown in ((2, "\ufffd"), (3, "加")):
        reader = AnswerReader(model.tokenizer, Reading())
        events = [Event(token) for token in ids[: count - 1]] + [Event(ids[count - 1], stop="length")]
        pieces = [piece for event in events for piece in reader.push(event)]
        assert set("".join(piece.text for piece in pieces)) == set(shown) and reader.num_tokens == count
        assert reader.finish_reason == "length"


def test_scores_that_are_not_finite_end_one_request_and_no_other(tmp_path: Path):
    model_dir = model_directory(tmp_path / "m", tie_word_embeddings=False)
    model = opened(model_dir)
    weight, bad = model.model.model.embed_tokens.weight, model.tokenizer.encode("x")[0]
    values = weight.numpy()
    values[bad] = np.nan
    weight.set_value(values)
    with client(model_dir, model) as server:
        before = server.complete(prompt="25加16", stop_token_ids=[bad])
        for more in ({}, {"stream": True}, {"n": 2}):
            error = server.bad(COMPLETIONS, 500, prompt=[bad], **more)
            assert error["code"] == "answer_failed" and "not finite" in error["message"]
        for more in ({"max_tokens": 0}, {"stream": True}):
            error = server.bad(COMPLETIONS, 500, prompt=[bad, bad], echo=True, logprobs=1, **more)
            assert error["code"] == "answer_failed" and "not finite" in error["message"]
        assert server.http.get("/health").status_code == 200
        after = server.complete(prompt="25加16", stop_token_ids=[bad])
        assert after["choices"][0]["text"] == before["choices"][0]["text"]


def test_fields_of_messages_that_the_model_does_not_see_are_said_once(server: Asking, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    log._said.clear()
    named = [{"role": "user", "content": "a", "name": "ann"}]
    talk = [*named, {"role": "assistant", "content": "b", "annotations": [{"type": "url_citation"}]}, *named]
    plain = [{name: message[name] for name in ("role", "content")} for message in talk]
    answer = server.chat(messages=plain)["choices"][0]["message"]
    assert not said
    assert all(server.chat(messages=talk)["choices"][0]["message"] == answer for _ in range(2))
    assert [line.split(":")[0] for line in said] == ["name in messages", "annotations in messages"]
