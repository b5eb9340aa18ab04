"""Several ranks generate what one process does, token for token, in every layout of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import tiny_model
from support.worlds import World

from erniekit import build, lora
from erniekit.build import AdapterDirectory, ModelOptions, prepare_model
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.generation.decode import Answer, Limits, decode
from erniekit.generation.sampling import Sampling
from erniekit.generation.session import Session, follow
from erniekit.models.decoder import CausalLM
from erniekit.models.pipeline_layout import cut_layers
from erniekit.parallel.mesh import Mesh, ParallelDims, build_mesh
from erniekit.precision import policy

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
            if parameter_name.endswith("_B"):  # an adapter that does nothing would prove nothing
                parameter.set_value(parameter + 0.2)
        save_adapter(model, directory / f"{name}-adapter")
    return directory


def load(directory: str, name: str, keys: dict[str, Any]) -> CausalLM:
    """The share of a model that this rank has in the layout that `keys` describe; all of it where there are none."""
    degrees = {key: keys[key] for key in ("pipeline", "data", "tensor", "expert") if key in keys}
    mesh = build_mesh(ParallelDims(**degrees)) if degrees else Mesh.single()
    options = ModelOptions(
        precision=policy.of_weights("float32", "cpu", keys.get("low_bit")),
        adapter=AdapterDirectory(Path(directory) / f"{name}-adapter") if keys.get("adapter") else None,
        sequence_parallel=keys.get("sequence_parallel", False),
    )
    stages, num_chunks = mesh.degrees.pipeline, keys.get("chunks", 1)
    layers = [tuple(range(i * LAYERS // stages // num_chunks, (i + 1) * LAYERS // stages // num_chunks)) for i in range(stages * num_chunks)]
    chunks = [layers[chunk * stages + mesh.pipe] for chunk in range(num_chunks)]
    return prepare_model(Path(directory) / name, options).build(mesh, chunks)


def answer(directory: str, name: str, keys: dict[str, Any], sampling: Sampling) -> list[tuple[list[int], str]]:
    model = load(directory, name, keys)
    answers = decode(model, PROMPTS, LIMITS, sampling, batch_size=keys.get("batch_size", 4))
    return [(each.ids, each.stop) for each in answers]


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
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_two_ranks_give_the_tokens_of_one_process(world2: World, models: Path, case: str, sampling: Sampling):
    name, keys = LAYOUTS_OF_TWO[case]
    keys_alone = {"adapter": keys.get("adapter")}
    alone = answer(str(models), name, keys_alone, sampling)
    assert len({tuple(ids) for ids, _ in alone}) > 3 and {stop for _, stop in alone} > {"stop"}
    for ranks in world2.run(answer, directory=str(models), name=name, keys=keys, sampling=sampling):
        assert ranks == alone
