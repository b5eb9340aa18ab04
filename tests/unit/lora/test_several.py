"""Rows with different adapters in one batch get the tokens that each adapter gives alone."""

from pathlib import Path

import pytest
from support.adapters import attach_random, randomize
from support.tiny_models import tiny_model

from erniekit import lora
from erniekit.checkpoint.peft_attach import attach_several, attach_stored, save_adapter
from erniekit.checkpoint.peft_read import StoredAdapter, read_adapter
from erniekit.generation.engine import Engine
from erniekit.generation.request import Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.lora.several import adapter_set_of
from erniekit.models.decoder import CausalLM
from erniekit.utils.errors import UserError

DRAWN = Sampling(temperature=1.1, top_p=0.95, seed=3)
PROMPTS = [[5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32, 33, 34], [5, 9, 33]]
NAMES = ["one", None, "two", "two", "one"]
TARGETS = {
    "dense": ({}, {"targets": ("qkv_proj", "down_proj"), "dora": True, "rank": 2}),
    "moe": ({}, {"targets": ("q_proj", "o_proj"), "rank": 5}),
}


def stored(kind: str, directory: Path, seed: int, **options: object) -> StoredAdapter:
    model = attach_random(tiny_model(kind), **options)
    for _ in range(seed):  # others than those of the first
        randomize(model)
    save_adapter(model, directory)
    return read_adapter(directory, model.config)


@pytest.fixture(scope="module", params=["dense", "moe"])
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("adapters")
    first, second = TARGETS[request.param]
    return request.param, {
        "one": stored(request.param, root / "one", 0, **first),
        "two": stored(request.param, root / "two", 1, **second),
    }


def answers(model: CausalLM, requests: list[Request], **options: int) -> list[list[int]]:
    engine = Engine(model, **options)
    generations = []
    for request in requests:
        generations.append(engine.add(request))
        engine.step()
    while not engine.is_idle:
        engine.step()
    return [generation.answer.ids for generation in generations]


def requests(names: list[str | None]) -> list[Request]:
    return [
        Request(prompt, Limits(7 + draw), DRAWN, draw, adapter=name)
        for draw, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True))
    ]


def test_rows_of_one_batch_have_the_adapters_that_they_name(adapters):
    kind, stored_ones = adapters
    alone: dict[str | None, list[list[int]]] = {None: answers(tiny_model(kind), requests([None] * 5))}
    for name, adapter in stored_ones.items():
        model = tiny_model(kind)
        attach_stored(model, adapter)
        model.eval()
        alone[name] = answers(model, requests([None] * 5))
    expected = [alone[name][place] for place, name in enumerate(NAMES)]
    assert len({str(rows) for rows in alone.values()}) == 3, "the adapters change the answers"
    model = tiny_model(kind)
    attach_several(model, stored_ones)
    model.eval()
    assert answers(model, requests(NAMES), max_running=4, prefill_tokens=64) == expected
    assert answers(model, requests([None] * 5)) == alone[None], "the base is untouched"


def test_keys_and_values_are_never_shared_between_adapters(adapters):
    kind, stored_ones = adapters
    model = tiny_model(kind)
    attach_several(model, stored_ones)
    engine = Engine(model, num_kept=8)

    def ask(name: str | None) -> tuple[list[int], int]:
        before = engine.num_reused
        generation = engine.add(Request(PROMPTS[2], Limits(4), DRAWN, adapter=name))
        while not engine.is_idle:
            engine.step()
        return generation.answer.ids, engine.num_reused - before

    first = {name: ask(name) for name in ("one", None, "two")}
    assert all(reused == 0 for _, reused in first.values())
    for name in ("two", "one", None):
        assert ask(name) == (first[name][0], len(PROMPTS[2]) - 1)
    together = [engine.add(Request(PROMPTS[2], Limits(4), DRAWN, adapter=name)) for name in first]
    while not engine.is_idle:
        engine.step()
    assert [generation.answer.ids for generation in together] == [ids for ids, _ in first.values()]


def test_an_unknown_adapter_is_refused(adapters):
    kind, stored_ones = adapters
    model = tiny_model(kind)
    with pytest.raises(UserError, match="no adapter 'one'"):
        Engine(model).add(Request([1], Limits(1), DRAWN, adapter="one"))
    attach_several(model, stored_ones)
    assert adapter_set_of(model).names == ("one", "two") and lora.state_of(model) is None
    with pytest.raises(UserError, match="no adapter 'three'"):
        Engine(model).add(Request([1], Limits(1), DRAWN, adapter="three"))
