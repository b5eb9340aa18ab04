"""Every rank starts its collectives in one order, also where buckets of gradients are sent during the backward pass (as
over NCCL) and a rank's microbatch has nothing to learn. Over TCP a difference is an error at once; over NCCL it would
be a hang, or gradients made of tokens.
"""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.equality import keys_for, prepare
from support.worlds import World

from erniekit.parallel import backend, mesh
from erniekit.parallel.process_group import World as Ranks

STAGES = ("stage1", "stage2", "stage3")
METHODS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "SFT with MTP": {"num_nextn_predict_layers": 1},
    "DPO": {"stage": "DPO", "reference_free": True},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples or pairs: of four rows a step, one in the second step is empty."""
    path = tmp_path_factory.mktemp("order")
    prepare(path)
    config = path / "moe" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    samples = [{"src": [f"{a}加1等于几？"], "tgt": [str(a + 1)]} for a in range(7)]
    pairs = [{"src": [f"{a}加1等于几？"], "response": [[str(a + 1)], ["不知道"]], "sort": [1, 0]} for a in range(7)]
    for name, lines in (("train", samples), ("pairs", pairs)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text)
    return path


def collectives(keys: dict[str, Any]) -> tuple[list[str], int]:
    """The kinds of this rank's collectives over an epoch with small buckets that are sent early, one after another; and
    how many of its microbatches had nothing to learn.
    """
    from support import equality

    from erniekit.parallel import grad_sync, zero
    from erniekit.training.forward_step import TrainStage

    heard: list[str] = []
    empty: Counter[str] = Counter()
    sync_init, divide, forward = grad_sync.GradientSync.__init__, zero.ShardedParameters.__init__, TrainStage.forward

    def overlapping(self: Any, *args: Any, **kwargs: Any) -> None:
        sync_init(self, *args, **(kwargs | {"overlap": True}))

    def in_small_buckets(self: Any, *args: Any, **kwargs: Any) -> None:
        divide(self, *args, **(kwargs | {"limit": 3000}))

    def watched(self: Any, chunk: int, microbatch: int, x: Any) -> Any:
        empty["empty"] += not len(self._runner.microbatches[microbatch].supervised)
        return forward(self, chunk, microbatch, x)

    grad_sync.GradientSync.__init__ = overlapping  # type: ignore[method-assign]
    zero.ShardedParameters.__init__ = in_small_buckets  # type: ignore[method-assign]
    TrainStage.forward = watched  # type: ignore[method-assign]
    backend.init(on_wait=lambda what: heard.append(what.split(" of ")[0]) if what else None)
    try:
        equality.train_some(keys)
    finally:
        grad_sync.GradientSync.__init__ = sync_init  # type: ignore[method-assign]
        zero.ShardedParameters.__init__ = divide  # type: ignore[method-assign]
        TrainStage.forward = forward  # type: ignore[method-assign]
        backend.init()
    return heard, empty["empty"]


@pytest.mark.parametrize("sharding", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_with_nothing_to_learn_keeps_the_order(ranks: World, directory: Path, method: str, sharding: str):
    more = dict(METHODS[method])
    if method == "DPO":
        more["train_dataset_path"] = str(directory / "pairs.jsonl")
    degrees = {"expert_parallel_degree": 2, "sharding_parallel_degree": 2, "sharding": sharding}
    length = {"max_steps": -1, "num_train_epochs": 1, "packing": False, "random_shuffle": False}
    keys = keys_for(str(directory), "moe", 2, **degrees, **length, **more) | {"gradient_accumulation_steps": 2}
    (first, without), (second, with_empty) = ranks.run(collectives, keys=keys)
    assert without + with_empty > 0, "every rank had something to learn: this tests nothing"
    assert first == second
    assert {"all_to_all", "reduce_scatter"} <= set(first)


def test_a_rank_without_pictures_keeps_the_order(ranks: World, directory: Path):
    """With sequence parallelism the pictures of a row may all be among the tokens of one rank."""
    keys = keys_for(
        str(directory), "vl", tensor_parallel_degree=2, sequence_parallel=True, gradient_accumulation_steps=1
    )
    (first, _), (second, _) = ranks.run(collectives, keys=keys)
    assert first == second
    assert {"all_gather", "all_reduce", "reduce_scatter"} <= set(first)


def test_experts_have_a_communicator_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """Where all groups are of the same ranks, tokens and gradients still travel apart."""
    created: list[list[int]] = []

    def new_group(members: list[int]) -> object:
        created.append(members)
        return SimpleNamespace(number=len(created))

    world = Ranks(0, 8, tuple(f"h:{i}" for i in range(8)))
    monkeypatch.setattr(backend, "_backend", backend._Backend(world))
    monkeypatch.setattr(backend.dist, "new_group", new_group)
    built = mesh.build_mesh(mesh.ParallelDims(data=8, expert=8, sharding=8))
    assert built.expert_group.ranks == built.shard_group.ranks == tuple(range(8))
    assert built.expert_group.handle is not built.shard_group.handle
    assert built.shard_group.handle is built.data_group.handle is built.world_group.handle
    assert created == [list(range(8))] * 2
