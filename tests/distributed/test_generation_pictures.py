"""Several ranks answer questions about pictures as one process does, in batches and in a conversation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import blocks
from support.vision_directories import vision_model_directory
from support.worlds import World

from erniekit.build import ModelOptions, prepare_model
from erniekit.data.records.fields import Notes
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.processor import load_processor
from erniekit.data.vision.prompt import PicturePrompt, picture_prompt
from erniekit.data.vision.sequence import MediaTokens
from erniekit.generation.decode import decode
from erniekit.generation.pictures import tables_of
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.generation.session import Session, follow
from erniekit.models.decoder import CausalLM
from erniekit.parallel.mesh import Mesh, ParallelDims, build_mesh
from erniekit.precision import policy

LIMITS = Limits(max_new_tokens=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl", weights=True, max_pixels=84 * 84)


def load(directory: str, degrees: dict[str, int]) -> CausalLM:
    """This rank's share of the model; all of it without degrees."""
    mesh = build_mesh(ParallelDims(**degrees)) if degrees else Mesh.single()
    prepared = prepare_model(directory, ModelOptions(precision=policy.of_weights("float32", "cpu", None)))
    layers, stages = prepared.config.num_hidden_layers, mesh.degrees.pipeline
    size = layers // stages
    return prepared.build(mesh, [tuple(range(mesh.pipe * size, (mesh.pipe + 1) * size))])


def prompts(directory: str) -> list[PicturePrompt]:
    """Conversations about two pictures, a video, another picture, and the first of these with a further round."""
    processor = load_processor(directory)
    tokens, spec = MediaTokens.of(processor.tokenizer), VisionSpec(processor.settings)
    images = [{"type": "image", "image": blocks(84, 56, seed)} for seed in range(3)]
    video = {"type": "video", "video": np.stack([blocks(56, 56, seed) for seed in range(4)])}
    contents: list[list[dict[str, Any]]] = [[images[0], images[1]], [video], [images[2]]]
    asked = [[{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}] for content in contents]
    asked.append([*asked[0], {"role": "assistant", "content": "yes"}, {"role": "user", "content": [images[2]]}])
    found = []
    for messages in asked:
        plans = processor.plan(messages, MediaReader(Path(".")), Notes())
        found.append(picture_prompt(processor.template.prompt_ids(messages), plans, tokens, spec))
    return found


def in_batches(directory: str, degrees: dict[str, int]) -> list[list[int]]:
    asked = prompts(directory)
    pictures = [tables_of(prompt) for prompt in asked]
    model = load(directory, degrees)
    answers = decode(model, [prompt.ids for prompt in asked], LIMITS, Sampling(), batch_size=3, pictures=pictures)
    return [answer.ids for answer in answers]


def in_a_conversation(directory: str, degrees: dict[str, int]) -> list[list[int]] | None:
    """The last prompt continues the first one, which another one has replaced in between."""
    model = load(directory, degrees)
    if model.mesh.rank:
        follow(model)
        return None
    session, asked = Session(model), prompts(directory)
    answers = []
    for i in (0, 3, 1, 2):
        *_, last = session.answer(asked[i], LIMITS, Sampling())
        answers.append(last.ids)
    session.close()
    return [answers[place] for place in (0, 2, 3, 1)]


LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "ep2": {"data": 2, "expert": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_the_tokens_of_one_process(world2: World, directory: Path, layout: str):
    alone = in_batches(str(directory), {})
    assert len({tuple(ids) for ids in alone}) > 1
    assert in_a_conversation(str(directory), {}) == alone
    for ranks in world2.run(in_batches, directory=str(directory), degrees=LAYOUTS[layout]):
        assert ranks == alone
    leader, follower = world2.run(in_a_conversation, directory=str(directory), degrees=LAYOUTS[layout])
    assert (leader, follower) == (alone, None)
