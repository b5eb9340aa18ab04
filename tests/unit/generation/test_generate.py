"""Generation gives the tokens that running the whole sequence at each step gives, in the form that users expect."""

import logging

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.generation.decode import decode
from erniekit.generation.generate import generate
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling, choose
from erniekit.generation.steppers import CachedStepper
from erniekit.models.decoder import CausalLM
from erniekit.utils.errors import UserError

PROMPTS = [[5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32, 33, 34]]
NO_END = 60  # an id that these models are asked to end at when they should not end
DRAW = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def dense() -> CausalLM:
    return tiny_model("dense")


def naive(model: CausalLM, prompt: list[int], count: int, sampling: Sampling, row: int = 0) -> list[int]:
    """The plain loop: the whole sequence through `model(input_ids)` for each token."""
    ids, rng = list(prompt), np.random.default_rng([sampling.seed or 0, row])
    for _ in range(count):
        scores = model(np.array([ids])).numpy()[0, -1]
        ids.append(choose(scores, prompt, ids[len(prompt) :], sampling, rng))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(seed=4, repetition_penalty=1.2, presence_penalty=0.3), Sampling(seed=7, **DRAW)],
    ids=["greedy", "penalties", "drawn"],
)
def test_cached_equals_uncached_token_for_token(model: CausalLM, sampling: Sampling):
    limits = Limits(max_new_tokens=12)
    found = decode(model, PROMPTS, limits, sampling)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
        assert answer.ids == naive(model, prompt, 12, sampling, row)
    for batch_size in (3, 1):
        assert decode(model, PROMPTS, limits, sampling, batch_size=batch_size) == found
    assert decode(model, PROMPTS, limits, sampling, use_cache=False) == found


def test_rows_that_end_leave_and_the_others_go_on_unchanged(model: CausalLM):
    free = decode(model, PROMPTS, Limits(max_new_tokens=15), Sampling())
    ends = tuple({answer.ids[place] for answer, place in zip(free, (2, 5, 9, 14), strict=True)})
    bounded = decode(model, PROMPTS, Limits(max_new_tokens=15, stop_ids=ends), Sampling())
    for whole, answer in zip(free, bounded, strict=True):
        first = min(whole.ids.index(end) for end in ends if end in whole.ids)
        assert answer.ids == whole.ids[:first]
        assert (answer.stop, answer.stop_id) == ("stop", whole.ids[first])
    assert len({len(answer.ids) for answer in bounded}) > 1, "the test needs rows that end at different steps"


def test_a_rectangular_batch_gives_prompts_and_answers(model: CausalLM):
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    found = generate(model, paddle.to_tensor(ids), max_new_tokens=6, eos_token_id=NO_END)
    assert found.dtype == paddle.int64
    assert found.shape == [2, 9]
    assert found.numpy()[:, :3].tolist() == ids.tolist()
    assert found.numpy()[1, 3:].tolist() == naive(model, ids[1].tolist(), 6, Sampling())
    assert generate(model, ids.tolist(), max_new_tokens=6, eos_token_id=NO_END).tolist() == found.tolist()
    assert generate(model, ids[0], max_new_tokens=6, eos_token_id=NO_END).tolist() == found[:1].tolist()


def test_ragged_lists_and_masked_padding_on_either_side_give_the_same_answers(model: CausalLM):
    options = {"max_new_tokens": 5, "eos_token_id": NO_END}
    width = max(len(prompt) for prompt in PROMPTS)
    ragged = generate(model, PROMPTS, **options).numpy()
    for row, prompt in zip(ragged, PROMPTS, strict=True):
        assert row[:width].tolist() == [0] * (width - len(prompt)) + prompt
        assert row[width:].tolist() == naive(model, prompt, 5, Sampling())
    left = ragged[:, :width]
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    mask = np.arange(width) >= width - lengths[:, None]
    assert generate(model, left, mask.astype(int), **options).tolist() == ragged.tolist()
    right = np.stack([np.roll(row, len(prompt) - width) for row, prompt in zip(left, PROMPTS, strict=True)])
    found = generate(model, right, np.arange(width) < lengths[:, None], **options).numpy()
    assert found[:, :width].tolist() == right.tolist()
    assert found[:, width:].tolist() == ragged[:, width:].tolist()


def test_end_tokens_are_kept_and_padding_follows(dense: CausalLM):
    free = generate(dense, PROMPTS, max_new_tokens=10, eos_token_id=[]).numpy()[:, -10:]
    end = int(free[0, 3])
    found = generate(dense, PROMPTS, max_new_tokens=10, eos_token_id=end, pad_token_id=50).numpy()[:, 11:]
    first = free[0].tolist().index(end)
    assert found[0].tolist() == free[0, : first + 1].tolist() + [50] * (found.shape[1] - first - 1)


def test_the_models_own_end_tokens_are_the_default():
    first = generate(tiny_model(), [PROMPTS[0]], max_new_tokens=8, eos_token_id=[]).numpy()[0, 3:].tolist()
    several = tiny_model(eos_token_id=[1, first[4]])
    found = generate(several, [PROMPTS[0]], max_new_tokens=8).numpy()[0, 3:].tolist()
    assert found == first[: first.index(first[4]) + 1]


def test_an_end_token_is_banned_before_the_lower_bound(dense: CausalLM):
    free = generate(dense, [PROMPTS[0]], max_new_tokens=8, eos_token_id=[]).numpy()[0, 3:].tolist()
    found = generate(dense, [PROMPTS[0]], max_new_tokens=8, min_new_tokens=5, eos_token_id=free[0]).numpy()[0, 3:]
    assert free[0] not in found[:5]
    assert len(found) >= 6 or free[0] not in found


def test_drawing_depends_on_the_seed_only(dense: CausalLM):
    def answers(prompts: list[list[int]], seed: int | None) -> np.ndarray:
        return generate(dense, prompts, max_new_tokens=10, seed=seed, eos_token_id=[], **DRAW).numpy()[:, -10:]

    four = answers(PROMPTS, 1)
    assert four.tolist() == answers(PROMPTS, 1).tolist() != answers(PROMPTS, 2).tolist()
    assert answers(PROMPTS[:2], 1).tolist() == four[:2].tolist()
    assert answers(PROMPTS, None).tolist() != answers(PROMPTS, None).tolist()
    same = answers([PROMPTS[0]] * 3, 1)
    assert len(np.unique(same, axis=0)) == 3, "equal prompts in a batch are drawn apart"


def test_greedy_unless_asked_otherwise(dense: CausalLM):
    def run(**options: object) -> list[list[int]]:
        return generate(dense, PROMPTS, max_new_tokens=10, seed=1, eos_token_id=[], **options).tolist()

    greedy = run()
    assert run(temperature=0) == run(do_sample=False, temperature=0.9) == run(temperature=0, top_p=0.9) == greedy
    assert run(top_k=1) == run(min_p=1.0) == greedy
    assert run(min_p=0.01) == run(min_p=0.01, do_sample=True) != greedy
    assert run(do_sample=True) == run(temperature=1.0) != greedy
    with pytest.raises(UserError, match="temperature"):
        run(do_sample=True, temperature=0)


def test_each_token_is_handed_on_as_it_comes(dense: CausalLM):
    seen: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    found = generate(
        dense, PROMPTS, max_new_tokens=6, eos_token_id=NO_END, stream=lambda row, token: seen[row].append(token)
    )
    assert list(seen.values()) == found.numpy()[:, -6:].tolist()


def test_a_full_context_stops_with_a_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    small = tiny_model(max_position_embeddings=12)
    found = decode(small, [[5] * 9, [6] * 2], Limits(max_new_tokens=8), Sampling())
    assert [len(answer.ids) for answer in found] == [3, 8]
    assert [answer.stop for answer in found] == ["context", "length"]
    assert "1 of 2 answers stopped because the model's context of 12 tokens" in caplog.text


def test_a_long_prompt_in_pieces_gives_the_same(dense: CausalLM, monkeypatch: pytest.MonkeyPatch):
    prompt = np.random.default_rng(0).integers(3, 60, 50).tolist()
    expected = naive(dense, prompt, 5, Sampling())
    monkeypatch.setattr(CachedStepper, "piece_tokens", 16)
    assert decode(dense, [prompt], Limits(max_new_tokens=5), Sampling())[0].ids == expected


def test_scores_that_are_not_finite_are_an_error_not_an_answer():
    broken = tiny_model()
    broken.model.norm.weight.set_value(np.full(broken.model.norm.weight.shape, np.nan, dtype=np.float32))
    with pytest.raises(UserError, match="not finite"):
        generate(broken, PROMPTS, max_new_tokens=3)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[]], {}, "no tokens"),
        ([[5], []], {}, "prompt 1 has no tokens"),
        ([[5] * 4096], {}, "4096 tokens"),
        ([[5, 61]], {}, "vocabulary"),
        ([[0.5]], {}, "token ids"),
        ([[[1]]], {}, "token ids"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[5]], {"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
        ([[5]], {"attention_mask": [[1, 1]]}, "attention_mask"),
        ([[5]], {"attention_mask": [[0]]}, "no tokens"),
    ],
)
def test_what_cannot_be_is_said(dense: CausalLM, ids: object, options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        generate(dense, ids, **options)


def test_an_unknown_argument_is_named(dense: CausalLM):
    with pytest.raises(TypeError, match=r"generate\(\) has no argument 'num_beams'"):
        generate(dense, [[5]], num_beams=2)
