"""Drafts of the prediction block change how fast an answer comes, not its tokens."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.generation.engine import Engine
from erniekit.generation.request import Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import packed_inputs
from erniekit.models.mtp import predict_ahead
from erniekit.utils.errors import ConfigError

DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=3)
PENALISED = Sampling(repetition_penalty=1.3)
PROMPTS = [[5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32, 33, 34], [5, 9, 33]]


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return agreeing(tiny_model(request.param, num_nextn_predict_layers=1))


def agreeing(model: CausalLM) -> CausalLM:
    """A model in which the last token decides most of what comes next, and whose block passes on the token that it
    gets, so that its drafts are right at times.
    """
    size = model.config.hidden_size
    with paddle.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "o_proj" in name:
                parameter.set_value(parameter * 0.3)
        passed_on = np.concatenate([np.eye(size), np.zeros((size, size))]).astype(np.float32)
        model.model.mtp_linear_proj[0].weight.set_value(passed_on)
    model.eval()
    return model


def run(engine: Engine, requests: list[Request]) -> list[tuple[list[int], str, int | None]]:
    generations = []
    for request in requests:
        generations.append(engine.add(request))
        engine.step()
    while not engine.is_idle:
        engine.step()
    assert [len(g.new_events()) for g in generations] == [len(g.answer.all_ids) for g in generations]
    return [(g.answer.ids, g.answer.stop, g.answer.stop_id) for g in generations]


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
def test_the_tokens_are_those_without_drafts(model: CausalLM, sampling: Sampling):
    requests = [
        Request(prompt, Limits(13 + draw, stop_ids=(40, 41)), sampling, draw % 4, num_scores=draw % 2 or None)
        for draw, prompt in enumerate(PROMPTS)
    ]
    plain = run(Engine(model, max_running=3, prefill_tokens=4), requests)
    engine = Engine(model, max_running=3, prefill_tokens=4, drafts=True)
    assert run(engine, requests) == plain
    assert engine.drafting is not None
    assert 0 < engine.drafting.num_accepted < engine.drafting.num_drafts
    for request in requests[:2]:
        (again,) = run(Engine(model, drafts=True), [request])
        assert again == plain[requests.index(request)]


def test_one_prompt_with_several_answers_and_kept_conversations(model: CausalLM):
    group = [Request(PROMPTS[2], Limits(9), DRAWN, draw) for draw in range(3)]
    plain, engine = Engine(model, num_kept=3), Engine(model, num_kept=3, drafts=True)
    for number in range(2):
        first = [plain.add(request) for request in group], [engine.add(request) for request in group]
        while not (plain.is_idle and engine.is_idle):
            plain.step()
            engine.step()
        assert [g.answer.ids for g in first[0]] == [g.answer.ids for g in first[1]]
        assert number == 0 or first[1][0].num_reused == first[0][0].num_reused - 1
        group = [Request([*PROMPTS[2], *first[0][0].answer.ids, 8, 4], Limits(9), DRAWN, 7)]


def test_drafts_are_what_the_trained_block_predicts(model: CausalLM):
    engine = Engine(model, prefill_tokens=3, drafts=True)
    generation = engine.add(Request(PROMPTS[2], Limits(12), Sampling()))
    while not engine.is_idle:
        engine.step()
        if not generation.answer.ids or generation.answer.stop:
            continue
        ids = np.array([*PROMPTS[2], *generation.answer.ids])
        inputs = packed_inputs(model, ids, np.ones_like(ids))
        with paddle.no_grad():
            (normed_TD,) = predict_ahead(model.model, model.model(inputs), inputs)
            # the last token whose next one is known predicts the one behind the answer
            assert generation.draft == int(model.head(normed_TD[len(ids) - 2 : len(ids) - 1]).argmax())


def test_models_that_cannot_draft_are_refused():
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        Engine(tiny_model("dense"), drafts=True)
