"""Several ranks generate what one process does, token for token, in every layout of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.worlds import World

from erniekit import build, lora
from erniekit.build import AdapterDirectory, ModelOptions, prepare_model
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.generation.decode import decode
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.generation.session import Session, follow
from erniekit.generation.steppers import CachedStepper
from erniekit.models.decoder import CausalLM
from erniekit.models.stages import finish_passes
from erniekit.parallel.mesh import Mesh, ParallelDims, build_mesh
from erniekit.precision import policy
from erniekit.precision.quantized_weight import QuantizedWeights
from erniekit.precision.weight_only import SCHEMES
from erniekit.utils.errors import CheckpointError

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13], [14, 15, 16, 17, 18], [19, 20, 21, 22]]
LIMITS = Limits(max_new_tokens=12, stop_ids=(5, 17))
DRAWN = Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=11)
LAYERS = 4  # two chunks on each of two stages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `dense`, `moe` and `untied`, and adapters for them."""
    directory = tmp_path_factory.mktemp("models")
    for name, kind, changes in (
        ("dense", "dense", {}),
        ("untied", "dense", {"tie_word_embeddings": False, "use_bias": True}),
        ("moe", "moe", {}),
    ):
        model = tiny_model(kind, vocab_size=62, num_hidden_layers=LAYERS, moe_layer_end_index=LAYERS - 1, **changes)
        save_model(model, directory / name)
        lora.attach(model, lora.LoraOptions(rank=4, alpha=8.0, seed=5), build.our_shapes(model.config), True)
        for parameter_name, parameter in model.named_parameters():
            if ".adapter.B" in parameter_name:  # an adapter that does nothing would prove nothing
                parameter.set_value(parameter + 0.2)
        assert answers_of(load(str(directory), name, {})) != answers_of(model)
        save_adapter(model, directory / f"{name}-adapter")
    return directory


def load(directory: str, name: str, keys: dict[str, Any]) -> CausalLM:
    """The share of a model that this rank has in the layout that `keys` describe; all of it where there are none."""
    degrees = {key: keys[key] for key in ("pipeline", "data", "tensor", "expert") if key in keys}
    mesh = build_mesh(ParallelDims(**degrees)) if degrees else Mesh.single()
    product = QuantizedWeights(SCHEMES[keys["low_bit"]]) if "low_bit" in keys else None
    options = ModelOptions(
        precision=policy.of_weights("float32", "cpu", product),
        adapter=AdapterDirectory(Path(directory) / f"{name}-adapter") if keys.get("adapter") else None,
        sequence_parallel=keys.get("sequence_parallel", False),
    )
    stages, num_chunks = mesh.degrees.pipeline, keys.get("chunks", 1)
    size = LAYERS // stages // num_chunks
    begins = [(chunk * stages + mesh.pipe) * size for chunk in range(num_chunks)]
    chunks = [tuple(range(begin, begin + size)) for begin in begins]
    return prepare_model(Path(directory) / name, options).build(mesh, chunks)


def answer(directory: str, name: str, keys: dict[str, Any], sampling: Sampling) -> list[tuple[list[int], str]]:
    return answers_of(load(directory, name, keys), sampling, keys.get("batch_size", 4))


def greedy_and_drawn(directory: str, name: str, keys: dict[str, Any]) -> list[list[tuple[list[int], str]]]:
    model = load(directory, name, keys)
    return [answers_of(model, sampling, keys.get("batch_size", 4)) for sampling in (Sampling(), DRAWN)]


def answers_of(model: CausalLM, sampling: Sampling = DRAWN, batch_size: int = 4) -> list[tuple[list[int], str]]:
    return [(each.ids, each.stop) for each in decode(model, PROMPTS, LIMITS, sampling, batch_size=batch_size)]


LAYOUTS_OF_TWO = {
    "dense-tp2": ("dense", {"tensor": 2}),
    "untied-tp2-sp": ("untied", {"tensor": 2, "sequence_parallel": True}),
    "moe-tp2-sp": ("moe", {"tensor": 2, "sequence_parallel": True}),
    "dense-lora-tp2": ("dense", {"tensor": 2, "adapter": True}),
    "moe-lora-tp2": ("moe", {"tensor": 2, "adapter": True}),
    "moe-ep2": ("moe", {"data": 2, "expert": 2, "batch_size": 1}),
    "moe-lora-ep2": ("moe", {"data": 2, "expert": 2, "adapter": True}),
    "dense-dp2": ("dense", {"data": 2}),
    "dense-pp2": ("dense", {"pipeline": 2}),
    "moe-pp2-chunks": ("moe", {"pipeline": 2, "chunks": 2}),
    "untied-lora-pp2": ("untied", {"pipeline": 2, "adapter": True}),
}


@pytest.mark.parametrize("case", LAYOUTS_OF_TWO)
def test_two_ranks_give_the_tokens_of_one_process(world2: World, models: Path, case: str):
    name, keys = LAYOUTS_OF_TWO[case]
    alone = greedy_and_drawn(str(models), name, {"adapter": keys.get("adapter")})
    for answers in alone:
        assert len({tuple(ids) for ids, _ in answers}) > 3
    assert {stop for answers in alone for _, stop in answers} == {"stop", "length"}, "rows leave the batch, and stay"
    for ranks in world2.run(greedy_and_drawn, directory=str(models), name=name, keys=keys):
        assert ranks == alone


LAYOUTS_OF_FOUR = {
    "moe-tp2-ep2": {"tensor": 2, "data": 2, "expert": 2},
    "moe-tp2-sp-ep2-lora": {"tensor": 2, "data": 2, "expert": 2, "sequence_parallel": True, "adapter": True},
    "moe-pp2-ep2": {"pipeline": 2, "data": 2, "expert": 2},
    "moe-pp2-tp2": {"pipeline": 2, "tensor": 2},
}


@pytest.mark.parametrize("case", LAYOUTS_OF_FOUR)
def test_four_ranks_give_the_tokens_of_one_process(world4: World, models: Path, case: str):
    keys = LAYOUTS_OF_FOUR[case]
    alone = answer(str(models), "moe", {"adapter": keys.get("adapter")}, DRAWN)
    for ranks in world4.run(answer, directory=str(models), name="moe", keys=keys, sampling=DRAWN):
        assert ranks == alone


def test_without_a_seed_the_ranks_still_draw_alike(world2: World, models: Path):
    """Each rank would draw for itself if the token did not come from one of them."""
    sampling = Sampling(temperature=2.0)
    for keys in ({"tensor": 2}, {"pipeline": 2}, {"data": 2}):
        first, second = world2.run(answer, directory=str(models), name="dense", keys=keys, sampling=sampling)
        assert first == second


def train_mode_answers(directory: str) -> tuple[list[tuple[list[int], str]], bool]:
    """As a rollout during training: the model that the trainer has, in the middle of its steps."""
    model = load(directory, "moe", {"tensor": 2, "sequence_parallel": True})
    model.train()
    return answers_of(model), model.training


def test_a_model_in_training_generates_and_goes_on_training(world2: World, models: Path):
    alone = answer(str(models), "moe", {}, DRAWN)
    assert world2.run(train_mode_answers, directory=str(models)) == [(alone, True)] * 2


def first_scores(directory: str, name: str, keys: dict[str, Any]) -> np.ndarray:
    """The scores after each prompt [B, V]; None on the first stage."""
    model = load(directory, name, keys)
    stepper = CachedStepper(model, len(PROMPTS))
    scores = stepper.feed(PROMPTS)
    finish_passes(model)
    return None if scores is None else scores.numpy()


@pytest.mark.parametrize("scheme", ["wint8", "nf4"])
def test_a_quantised_base_is_equal_without_tensor_parallelism(world2: World, models: Path, scheme: str):
    keys = {"low_bit": scheme, "adapter": True}
    alone = answer(str(models), "moe", keys, DRAWN)
    assert alone != answer(str(models), "moe", {"adapter": True}, DRAWN), "nothing was quantised"
    for degrees in ({"pipeline": 2}, {"data": 2, "expert": 2}):
        for ranks in world2.run(answer, directory=str(models), name="moe", keys=keys | degrees, sampling=DRAWN):
            assert ranks == alone


@pytest.mark.parametrize("scheme", ["wint8", "nf4"])
def test_a_quantised_base_is_close_under_tensor_parallelism(world2: World, models: Path, scheme: str):
    """Each shard has scales of its own: the scores differ by less than the quantisation itself changes them."""
    keys = {"low_bit": scheme}
    exact, alone = (first_scores(str(models), "dense", each) for each in ({}, keys))
    shared, same = world2.run(first_scores, directory=str(models), name="dense", keys=keys | {"tensor": 2})
    assert np.array_equal(shared, same)
    changed_by = np.abs(alone - exact).mean()
    assert changed_by > 0 and np.abs(shared - exact).mean() < 1.5 * changed_by


def talk(directory: str, keys: dict[str, Any]) -> list[list[int]] | None:
    """Two questions in one conversation, an answer that is left after three tokens, and a conversation from anew."""
    model = load(directory, "moe", keys)
    if model.mesh.rank:
        return follow(model)
    session, conversation, answers = Session(model), list(PROMPTS[0]), []
    for turn, wanted in enumerate((100, 3, 100)):
        steps = session.answer(conversation, LIMITS, DRAWN, turn)
        ids = [each.all_ids[-1] for each, _ in zip(steps, range(wanted), strict=False)]
        steps.close()
        answers.append(ids)
        conversation += [*ids, 33, 34]
    session.clear()
    answers.append([each.all_ids[-1] for each in session.answer(PROMPTS[3], LIMITS, DRAWN)])
    session.close()
    return answers


@pytest.mark.parametrize("keys", [{"tensor": 2}, {"pipeline": 2}, {"data": 2, "expert": 2}], ids=["tp2", "pp2", "ep2"])
def test_the_other_ranks_follow_a_conversation(world2: World, models: Path, keys: dict[str, Any]):
    alone = talk(str(models), {})
    assert [len(ids) for ids in alone][1] == 3
    assert world2.run(talk, directory=str(models), keys=keys) == [alone, None]


def refused(directory: str, keys: dict[str, Any]) -> str:
    """What a model with a weight that is not a number says."""
    model = load(directory, "dense", keys)
    if model.shard.has_head:
        model.model.norm.weight.set_value(paddle.full_like(model.model.norm.weight, float("nan")))
    with pytest.raises(CheckpointError) as caught:
        decode(model, PROMPTS, LIMITS, Sampling())
    return str(caught.value)


def test_scores_that_are_not_finite_end_every_rank_with_the_same_words(world2: World, models: Path):
    """Also those on stages that have no scores."""
    first, second = world2.run(refused, directory=str(models), keys={"pipeline": 2})
    assert first == second and "not finite" in first
