"""A session computes only what is new, and answers as if it computed everything."""

import numpy as np
import pytest
from support.tiny_models import tiny_model

from erniekit.generation.decode import decode
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.generation.session import Session
from erniekit.models.decoder import CausalLM
from erniekit.utils.errors import UserError

LIMITS = Limits(max_new_tokens=6)
GREEDY = Sampling()


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_model(request.param)


@pytest.fixture
def fed(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the model."""
    sizes: list[int] = []
    extend = model.extend

    def counting(ids: np.ndarray, lengths: np.ndarray, cache: object) -> object:
        sizes.append(int(np.sum(lengths)))
        return extend(ids, lengths, cache)

    monkeypatch.setattr(model, "extend", counting)
    return sizes


def whole(session: Session, prompt: list[int]) -> list[int]:
    *_, answer = session.answer(prompt, LIMITS, GREEDY)
    return answer.ids


def alone(model: CausalLM, prompt: list[int]) -> list[int]:
    return decode(model, [prompt], LIMITS, GREEDY, use_cache=False)[0].ids


def test_a_second_turn_feeds_only_what_is_new(model: CausalLM, fed: list[int]):
    session = Session(model)
    first = [5, 6, 7, 8, 9]
    answer = whole(session, first)
    assert answer == alone(model, first)
    assert fed == [5, 1, 1, 1, 1, 1]
    fed.clear()
    second = [*first, *answer, 20, 21]
    assert whole(session, second) == alone(model, second)
    # The answer's last token had not been fed.
    assert fed == [3, 1, 1, 1, 1, 1]
    assert session.reused == 10


def test_another_history_is_fed_from_where_it_differs(model: CausalLM, fed: list[int]):
    session = Session(model)
    whole(session, [5, 6, 7, 8, 9, 10])
    fed.clear()
    other = [5, 6, 30, 31, 32]
    assert whole(session, other) == alone(model, other)
    assert (fed[0], session.reused) == (3, 2)
    assert whole(session, other) == alone(model, other), "the same again: its last token is fed once more"
    assert session.reused == 4
    shorter = [5, 6]
    assert whole(session, shorter) == alone(model, shorter)
    unlike = [40, 41]
    assert whole(session, unlike) == alone(model, unlike)
    assert session.reused == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_answer_may_be_left_at_any_point(model: CausalLM, steps: int):
    session = Session(model)
    first = [5, 6, 7, 8]
    answers = session.answer(first, LIMITS, GREEDY)
    for _ in range(steps):
        next(answers)
    answers.close()
    second = [*first, *alone(model, first)[:steps], 33, 34]
    assert whole(session, second) == alone(model, second)


def test_an_interrupt_inside_the_model_does_no_harm(model: CausalLM, monkeypatch: pytest.MonkeyPatch):
    session = Session(model)
    extend, calls = model.extend, iter([False, False, True])

    def interrupted(*args: object) -> object:
        scores = extend(*args)
        if next(calls, False):
            raise KeyboardInterrupt
        return scores

    monkeypatch.setattr(model, "extend", interrupted)
    first = [5, 6, 7, 8]
    with pytest.raises(KeyboardInterrupt):
        whole(session, first)
    second = [*first, 50, 51]
    assert whole(session, second) == alone(model, second)


def test_each_turn_draws_anew_and_a_seed_repeats_it(model: CausalLM):
    def answers(seed: int) -> list[list[int]]:
        session, drawn = Session(model), Sampling(temperature=2.0, seed=seed)
        return [list(session.answer([5, 6], LIMITS, drawn, turn))[-1].ids for turn in range(2)]

    assert answers(1) == answers(1) != answers(2)
    assert answers(1)[0] != answers(1)[1]


def test_a_prompt_that_does_not_fit_is_refused_at_once(model: CausalLM):
    session = Session(model)
    answer = whole(session, [5, 6])
    with pytest.raises(UserError, match="4096"):
        session.answer([5] * 5000, LIMITS, GREEDY)
    assert whole(session, [5, 6, *answer, 7]) == alone(model, [5, 6, *answer, 7])
    assert session.reused == 7
