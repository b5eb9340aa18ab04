"""The Scorer: tables, failures, time limits, the user's own functions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards import Sample, Scorer
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError, TrainError

FUNCTIONS = """
import asyncio, enum, os, sys
import numpy as np

class Verdict(enum.IntEnum):
    GOOD = 1

class Word(str):
    pass

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError

def text(completion):
    return completion[0]["content"]

def length(prompts, completions, completion_ids, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(kwargs["answer"])
    return [len(ids) for ids in completion_ids]

def ends(completions, answer):  # takes no **kwargs
    return np.array([text(c).endswith(a) for c, a in zip(completions, answer)])

async def later(completions, trainer_state, log_metric, log_extra, **kwargs):
    await asyncio.sleep(0)
    log_metric("size", len(completions))
    log_extra("seen", [text(c) for c in completions])
    return [float(trainer_state.global_step)] * len(completions)

def odd(completions, **kwargs):
    print("printed text does not disturb the answers")
    values = []
    for c in completions:
        if text(c) == "hang":
            while True: pass
        if text(c) == "die":
            os._exit(3)
        if text(c) == "exit":
            sys.exit(1)
        if text(c) == "raise":
            raise KeyError("solution")
        odd = {"nan": float("nan"), "inf": float("inf"), "huge": 1e300, "text": "1", "none": None}
        values.append(odd.get(text(c), 1))
    return values

def unprintable(completions, **kwargs):
    raise Unprintable

def logs(completions, log_extra, **kwargs):
    log_extra("seen", [Verdict.GOOD, Word("w"), np.float32(0.5), np.bool_(True), None, [1]])
    return [1.0] * len(completions)

def short(completions, **kwargs):
    return [1.0]

def scalar(completions, **kwargs):
    return 1.0

def needs(completions, solution):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "my.py").write_text(FUNCTIONS, encoding="utf-8")
    (folder / "broken.py").write_text("import a_package_that_is_not_there", encoding="utf-8")
    return folder


@pytest.fixture
def scorer(base: Path) -> Iterator[Any]:
    made: list[Scorer] = []

    def make(*names: str, **keys: Any) -> Scorer:
        made.append(Scorer(RewardArgs(reward_funcs=names, **keys), base))
        return made[-1]

    yield make
    for one in made:
        one.close()


def sample(text: str, line: int = 1, **fields: Any) -> Sample:
    return Sample(
        [{"role": "user", "content": "?"}], text, tuple(range(len(text))), {"answer": "5", **fields}, f"d:{line}"
    )


def test_two_functions_of_one_name_are_refused(base: Path):
    with pytest.raises(ConfigError, match="length: two functions have this name"):
        Scorer(RewardArgs(reward_funcs=("length", "my.py:length")), base)


def test_the_weighted_sum_and_what_is_right(scorer):
    table = scorer("exact", "my.py:length", reward_weights=(2.0, -0.5)).score(
        [sample("5"), sample("66"), sample("", 2)]
    )
    assert table.values["length"].tolist() == [1, 2, 0]
    assert table.total.tolist() == [1.5, -1.0, 0.0]
    assert table.accuracy is not None and table.accuracy.tolist() == [1, 0, 0]
    assert table.failures == {}


def test_functions_of_trl_are_called_as_there(scorer):
    table = scorer("my.py:ends", "my.py:later").score([sample("=5"), sample("=6"), sample("5", 2)], step=7)
    assert table.values["ends"].tolist() == [1, 0, 1]
    assert table.values["later"].tolist() == [7, 7, 7]
    assert table.metrics == {"size": 1.5}
    assert table.extras == {"seen": ["=5", "=6", "5"]}


def test_values_that_a_function_logs_need_none_of_its_classes(scorer):
    """The trainer's process, which reads them, has not imported the user's file."""
    table = scorer("my.py:logs").score([sample(text) for text in "abcdef"])
    (seen,) = table.extras.values()
    assert seen == [1, "w", 0.5, True, None, "[1]"]
    assert [type(value) for value in seen] == [int, str, float, bool, type(None), str]


def test_every_failure_is_named_and_only_its_completion_suffers(scorer):
    texts = ["fine", "hang", "die", "exit", "raise", "nan", "inf", "huge", "text", "none"]
    one = scorer("my.py:odd", reward_timeout=0.7, reward_max_failures=1.0)
    for policy, expected in (("drop", np.nan), ("zero", 0.0)):
        object.__setattr__(one._cfg, "reward_on_failure", policy)
        with log.captured() as lines:
            table = one.score([sample(text, line) for line, text in enumerate(texts)] + [sample("fine", 4)])
        values = table.values["odd"]
        assert values[[0, 10]].tolist() == [1, 1]
        np.testing.assert_array_equal(values[1:9], expected)
        assert np.isnan(values[9])  # None is no failure
        assert table.failures == {"odd": 8}
        if policy == "drop":
            assert len(lines) == 3 and all(is_warning for is_warning, _ in lines)
            assert "further ones are only counted" in lines[-1][1]


def test_a_function_that_hangs_for_one_of_a_prompt_scores_the_others(scorer):
    with log.captured() as lines:
        table = scorer("my.py:odd", reward_timeout=0.7).score([sample("a"), sample("hang"), sample("b")])
    assert table.values["odd"].tolist()[::2] == [1, 1]
    assert "d:1: it took more than 0.7 s" in lines[0][1]


def test_a_function_that_fails_for_a_prompt_alone_is_named_once(scorer):
    """One that compares completions gets other rewards where each is scored alone, so that has to be said."""
    with log.captured() as lines:
        table = scorer("my.py:short").score([sample(text, line) for line in (1, 2) for text in ("a", "b")])
    assert table.values["short"].tolist() == [1] * 4 and table.failures == {}
    ((is_warning, line),) = lines
    assert is_warning and "reward short: d:" in line and "it returned 1 value for 2 completions" in line
    assert "called for each of them alone" in line


STOPS = [
    ("odd", "raise", r"reward odd: d:1: KeyError: 'solution' \(my.py:\d+\) \(reward_on_failure: stop\)"),
    ("odd", "nan", "it gave nan"),
    ("odd", "text", "it gave '1' of the type str"),
    ("odd", "huge", "it gave 1e.300, which is beyond"),
    ("scalar", "", "it returned float, not a list"),
    ("unprintable", "", r"Unprintable: its text cannot be shown, since its __str__ raises, too \(my.py:\d+\)"),
    ("logs", "", r"log_extra\('seen'\) got 6 values for 1 completion \(my.py:\d+\)"),
    ("needs", "", "solution"),
]


def test_stop_ends_the_run(scorer):
    names = [f"my.py:{name}" for name in dict.fromkeys(function for function, _, _ in STOPS)]
    one = scorer(*names, reward_on_failure="stop", reward_workers=1)
    for function, text, expected in STOPS:
        with pytest.raises(TrainError, match=expected):
            one.score([sample(text, reward_funcs=[function])])


def test_failures_and_logged_numbers_are_those_of_a_rollout_that_is_scored_in_parts(scorer):
    """As dynamic_sample scores further prompts: one of them that fails does not end the run."""
    one = scorer("my.py:odd", "my.py:later")
    first = one.score([sample("a"), sample("b"), sample("c", line=2)])
    second = one.score([sample("raise", line=3)])
    assert first.metrics == {"size": 1.5} and second.metrics == {"size": pytest.approx(4 / 3)}
    assert second.failures == {"odd": 1}
    one.begin_rollout()
    with pytest.raises(TrainError, match="failed for 1 of 1 completion, more than reward_max_failures"):
        one.score([sample("raise")])


def test_a_list_of_the_wrong_length_is_no_reward(scorer):
    with pytest.raises(TrainError, match="failed for 2 of 2 completions, more than reward_max_failures"):
        scorer("my.py:scalar").score([sample("a"), sample("b")])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"reward_funcs": ("acuracy",)}, "acuracy: there is no such function. Choose from accuracy, "),
        ({"reward_funcs": ()}, "reward_funcs: empty"),
        ({"reward_funcs": ("missing.py:f",)}, "there is no file"),
        ({"reward_funcs": ("my.py:f",)}, "there is no function f in .*it has text, length"),
        ({"reward_funcs": ("my.txt:f",)}, "expected path.py:name"),
        ({"reward_funcs": ("broken.py:f",)}, "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ({"reward_weights": (1.0,)}, "1 weight for 2 of reward_funcs"),
        ({"reward_weights": (0.0, 0.0)}, "all weights are 0"),
        ({"reward_funcs": ("format", "cosine")}, "cosine needs one of accuracy"),
        ({"reward_funcs": ("code",)}, "Set code_sandbox: subprocess"),
        ({"reward_funcs": ("judge",)}, "judge_base_url: needed"),
        ({"reward_funcs": ("reward_model",)}, "reward_model_path: needed"),
    ],
)
def test_wrong_settings_are_refused_at_the_start(base: Path, keys: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        Scorer(RewardArgs(**keys), base)


def test_records_are_checked_before_training(scorer):
    one = scorer("accuracy", "my.py:needs", answer_key="solution")
    one.check({"solution": "5"}, "d:1")
    one.check({"solution": 0}, "d:1")
    with pytest.raises(DataError, match="d:2: the record has no 'solution', which the reward accuracy needs"):
        one.check({"answer": "5"}, "d:2")
    with pytest.raises(DataError, match=r"d:2: the record has no 'solution', .* reward needs needs. Add it, or leave"):
        one.check({"answer": "5", "reward_funcs": ["needs"]}, "d:2")
    with pytest.raises(DataError, match="d:3: 'reward_funcs' has 'format', which is none of"):
        one.check({"solution": "5", "reward_funcs": "format"}, "d:3")


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("choice", {"answer": "b"}, "is not a letter from A to H: 'b'"),
        ("exact", {"answer": {"text": "5"}}, "is neither text nor a number"),
        ("accuracy", {"answer": ["5", None]}, "is neither text nor a number"),
        ("box_iou", {"answer": "[30, 10, 20, 40]"}, "must be boxes"),
        ("point_in_box", {"answer": [1, 2]}, "must be boxes"),
        ("tool_calls", {"answer": [{"function": "f"}]}, "must be a list of"),
        ("tool_calls", {"answer": [{"name": "f", "arguments": "{a}"}]}, "the reward tool_calls cannot read the record"),
        ("code", {"tests": [{"input": "1", "output": 1}]}, "'tests' of the record must be a list"),
    ],
)
def test_what_a_function_cannot_read_is_found_before_training(scorer, name: str, fields: dict, said: str):
    one = scorer(name, code_sandbox="subprocess", code_network=True) if name == "code" else scorer(name)
    with pytest.raises(DataError, match=f"d:4: the reward {name} cannot read the record: .*") as caught:
        one.check(fields, "d:4")
    assert said in str(caught.value)


def test_a_schema_that_is_none_is_found_before_training(scorer):
    pytest.importorskip("jsonschema")
    one = scorer("json_schema")
    one.check({"json_schema": {"type": "object"}}, "d:1")
    one.check({"json_schema": '{"type": "object"}'}, "d:1")
    for schema, said in (
        ({"type": "objekt"}, "is not a valid JSON schema"),
        ("[1]", "no 'json_schema' that is an object"),
    ):
        with pytest.raises(DataError, match=f"d:2: the reward json_schema cannot read the record: .*{said}"):
            one.check({"json_schema": schema}, "d:2")


def test_a_record_may_choose_its_functions(scorer):
    table = scorer("exact", "format").score([sample("5", reward_funcs=["exact"]), sample("5", 2)])
    np.testing.assert_array_equal(table.values["format"], [np.nan, 0])
    assert table.total.tolist() == [1, 1]


def test_domains_are_scaled_and_remembered(scorer):
    one = scorer("my.py:length", domain_normalize=True)
    samples = [sample("a" * n, n, domain=domain) for n, domain in ((1, "m"), (3, "m"), (10, "c"), (30, "c"), (20, "c"))]
    total = one.score(samples).total
    np.testing.assert_allclose(total, [-(2**-0.5), 2**-0.5, -1, 1, 0], atol=1e-4)
    again = scorer("my.py:length", domain_normalize=True)
    again.load_state_dict(one.state_dict())
    next_one = [sample("a" * 5, domain="m")]
    assert again.score(next_one).total == one.score(next_one).total
    np.testing.assert_allclose(one.score(next_one).total, (5 - 3.5) / np.std([1, 3, 5, 5], ddof=1), rtol=1e-3)


def test_the_order_of_the_results_does_not_depend_on_the_workers(base: Path):
    samples = [sample(str(n), n // 4) for n in range(40)]
    tables = []
    for workers in (1, 3):
        with Scorer(RewardArgs(reward_funcs=("exact", "my.py:length"), reward_workers=workers), base) as one:
            tables.append(one.score(samples))
    np.testing.assert_array_equal(tables[0].total, tables[1].total)
