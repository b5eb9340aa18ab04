"""Requests that join and leave a running batch get the tokens that each gets alone."""

from dataclasses import replace

import numpy as np
import pytest
from support.tiny_models import tiny_model

from erniekit.generation.engine import Engine
from erniekit.generation.request import Generation, Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
from erniekit.utils.errors import CheckpointError, UserError

DRAWN = Sampling(temperature=1.1, top_p=0.95, seed=3)
PROMPTS = [[5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32, 33, 34], [5, 9, 34, 2]]


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def dense() -> CausalLM:
    return tiny_model("dense")


def requests(sampling: Sampling = DRAWN, tokens: int = 9) -> list[Request]:
    return [Request(prompt, Limits(tokens + 2 * draw), sampling, draw) for draw, prompt in enumerate(PROMPTS)]


def alone(model: CausalLM, request: Request) -> list[int]:
    engine = Engine(model, max_running=1)
    return finished(engine, engine.add(request)).answer.ids


def finished(engine: Engine, generation: Generation) -> Generation:
    while not generation.answer.stop:
        engine.step()
    return generation


def run(engine: Engine) -> None:
    for _ in range(1000):
        if engine.is_idle:
            return
        engine.step()
    pytest.fail("the engine does not come to an end")


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_requests_that_come_at_different_steps_get_the_tokens_that_they_get_alone(model: CausalLM, sampling: Sampling):
    expected = [alone(model, request) for request in requests(sampling)]
    engine = Engine(model, max_running=3, prefill_tokens=8)
    generations = []
    for request in requests(sampling):
        generations.append(engine.add(request))
        engine.step()
        assert engine.num_running <= 3
    run(engine)
    assert [generation.answer.ids for generation in generations] == expected


def test_equal_prompts_are_read_once(model: CausalLM, monkeypatch: pytest.MonkeyPatch):
    group = [Request(PROMPTS[2], Limits(6), DRAWN, draw) for draw in range(4)]
    expected = [alone(model, request) for request in group]
    fed: list[int] = []
    extend = type(model).extend

    def count(self: CausalLM, ids: np.ndarray, *rest: object) -> object:
        fed.append(ids.size)
        return extend(self, ids, *rest)

    monkeypatch.setattr(type(model), "extend", count)
    engine = Engine(model, max_running=4)
    generations = [engine.add(request) for request in group]
    engine.step()
    assert fed == [len(PROMPTS[2])]
    run(engine)
    assert [generation.answer.ids for generation in generations] == expected
    assert len({tuple(ids) for ids in expected}) == 4
    assert engine.num_reused == 3 * len(PROMPTS[2])


def test_the_beginning_of_an_ended_conversation_is_reused(model: CausalLM):
    engine = Engine(model, num_kept=2)
    first = finished(engine, engine.add(Request(PROMPTS[2], Limits(5), DRAWN)))
    longer = Request([*PROMPTS[2], *first.answer.ids, 8, 4], Limits(6), DRAWN, 7)
    second = finished(engine, engine.add(longer))
    # The last token of an answer has not been fed.
    assert engine.num_reused == len(PROMPTS[2]) + 4
    assert second.answer.ids == alone(model, longer)
    other = Request([*PROMPTS[2][:4], 50], Limits(6), DRAWN, 1)
    assert finished(engine, engine.add(other)).answer.ids == alone(model, other)
    assert engine.num_reused == len(PROMPTS[2]) + 4 + 4


def test_owners_wait_by_turns_and_share_nothing(dense: CausalLM):
    engine = Engine(dense, max_running=1, num_kept=4)
    owners = ["a"] * 4 + ["b"] * 2 + ["c"]
    generations = [
        engine.add(Request([5, 9, 33, 7], Limits(2), DRAWN, draw, owner=owner)) for draw, owner in enumerate(owners)
    ]
    order: list[int] = []
    while not engine.is_idle:
        order += [generations.index(generation) for generation in engine.step() if generation.answer.stop]
    assert order == [0, 4, 6, 1, 5, 2, 3]
    assert [generations[place].num_reused for place in order] == [0, 0, 0, 3, 3, 3, 3], "each its own conversations"


def test_conversations_of_equal_tokens_are_told_apart(dense: CausalLM):
    engine = Engine(dense, num_kept=2)
    _, first, again = (
        finished(engine, engine.add(Request(np.array(PROMPTS[2]), Limits(3), Sampling(), owner=owner)))
        for owner in "abb"
    )
    assert again.num_reused == len(PROMPTS[2]) - 1 and again.answer.ids == first.answer.ids


def test_what_is_kept_has_a_bound(dense: CausalLM):
    engine = Engine(dense, num_kept=2)
    for draw, prompt in enumerate(PROMPTS):
        engine.add(Request(prompt, Limits(2), DRAWN, draw))
    run(engine)
    assert len(engine._kept) == 2


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "read", "running"])
def test_a_cancelled_request_leaves_and_the_others_stay_as_they_are(dense: CausalLM, steps: int):
    expected = [alone(dense, request) for request in requests()]
    engine = Engine(dense, max_running=2, prefill_tokens=4)
    generations = [engine.add(request) for request in requests()]
    for _ in range(steps):
        engine.step()
    engine.cancel(generations[0])
    engine.cancel(generations[2], "time-out")
    run(engine)
    assert [generations[0].answer.stop, generations[2].answer.stop] == ["cancelled", "time-out"]
    for number in (1, 3, 4):
        assert generations[number].answer.ids == expected[number]


def test_a_long_prompt_is_read_between_the_steps_of_running_answers(dense: CausalLM):
    prompt = np.random.default_rng(0).integers(3, 60, 40).tolist()
    long = Request(prompt, Limits(4), DRAWN, 9)
    engine = Engine(dense, prefill_tokens=8)
    running = engine.add(Request(PROMPTS[0], Limits(20), DRAWN))
    engine.step()
    reading = engine.add(long)
    for step in range(5):
        assert not reading.answer.ids
        engine.step()
        assert len(running.answer.ids) == 2 + step
    assert len(reading.answer.ids) == 1
    run(engine)
    assert reading.answer.ids == alone(dense, long)


def test_scores_are_the_models_log_probabilities(model: CausalLM):
    request = Request(PROMPTS[0], Limits(5), Sampling(temperature=0.7, seed=1, repetition_penalty=1.3), num_scores=3)
    plain = Request(PROMPTS[1], Limits(5), Sampling(), num_scores=0, score_temperature=2.0)
    engine = Engine(model)
    found, other = engine.add(request), engine.add(plain)
    run(engine)
    for generation, temperature, count in ((found, 1.0, 3), (other, 2.0, 0)):
        ids = [*generation.request.prompt, *generation.answer.ids]
        logits = model(np.array([ids])).numpy()[0].astype(np.float64) / temperature
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert len(generation.answer.scores) == 5
        for place, score in enumerate(generation.answer.scores):
            row = logprobs[len(generation.request.prompt) - 1 + place]
            assert score.logprob == pytest.approx(row[generation.answer.ids[place]], abs=1e-5)
            assert [token for token, _ in score.top] == np.argsort(-row)[:count].tolist()


def test_a_constraint_restricts_the_choice(dense: CausalLM):
    def even(ids: list[int]) -> np.ndarray:
        return np.arange(dense.config.vocab_size) % 2 == len(ids) % 2

    for sampling in (Sampling(), DRAWN):
        engine = Engine(dense)
        free = engine.add(Request(PROMPTS[0], Limits(8), sampling, 0))
        bound = engine.add(Request(PROMPTS[0], Limits(8), sampling, 1, constraint=even))
        run(engine)
        assert [token % 2 for token in bound.answer.ids] == [0, 1] * 4
        assert free.answer.ids == alone(dense, Request(PROMPTS[0], Limits(8), sampling, 0))


def test_a_prompt_that_does_not_fit_is_refused_and_nothing_waits(dense: CausalLM):
    engine = Engine(dense)
    with pytest.raises(UserError, match="no tokens"):
        engine.add(Request([], Limits(1), Sampling()))
    assert engine.is_idle


@pytest.mark.parametrize("options", [{}, {"drafts": True}], ids=["plain", "drafts"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_answer_whose_scores_are_not_finite_ends_alone(kind: str, options: dict[str, bool]):
    changes = {"num_nextn_predict_layers": 1} if options else {}
    model, bad = tiny_model(kind, tie_word_embeddings=False, **changes), 60
    wanted = [replace(each, num_scores=each.draw % 2 or None, never=(bad,)) for each in requests()]
    expected = [alone(model, request) for request in wanted]
    _break_token(model, bad)
    engine = Engine(model, max_running=4, num_kept=2, **options)
    broken, good = [], []
    for request in wanted:
        broken.append(engine.add(replace(request, prompt=[7, bad], fails_alone=True)))
        good.append(engine.add(replace(request, fails_alone=True)))
        engine.step()
    run(engine)
    assert [generation.answer.ids for generation in good] == expected
    for generation in broken:
        (event,) = generation.new_events()
        assert (event.stop, event.token) == ("error", None) and "not finite" in event.error == generation.error
    again = Request([*PROMPTS[0], 3], Limits(3), DRAWN, fails_alone=True)
    assert not finished(engine, engine.add(again)).error, "its keys and values are kept for nobody"
    engine.add(Request([bad], Limits(2), DRAWN))
    with pytest.raises(CheckpointError, match="not finite"):
        engine.step()


def test_an_answer_may_fail_after_some_tokens():
    model = tiny_model(tie_word_embeddings=False)
    ids = alone(model, Request([7], Limits(8), Sampling()))
    place = next(place for place in range(1, 8) if ids[place] not in [7, *ids[:place]])
    _break_token(model, ids[place])
    engine = Engine(model, num_kept=1)
    generation = finished(engine, engine.add(Request([7], Limits(8), Sampling(), fails_alone=True)))
    assert generation.answer.ids == ids[: place + 1] and generation.error
    assert generation.new_events()[-1].stop == "error"
    assert finished(engine, engine.add(Request([7, 8], Limits(2), Sampling()))).num_reused == 0


def _break_token(model: CausalLM, token: int) -> None:
    """Whoever reads the token gets no numbers."""
    weight = model.model.embed_tokens.weight
    values = weight.numpy()
    values[token] = np.nan
    weight.set_value(values)
