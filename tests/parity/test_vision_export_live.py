"""An exported vision-language model in transformers: same arrays and logits on a row with a picture. Skipped where
torch is absent.
"""

from pathlib import Path

import numpy as np
import paddle
import pytest
from parity.support import LOGIT_TOLERANCE
from PIL import Image
from support.pictures import blocks
from support.vision_directories import vision_model_directory

import erniekit
from erniekit.export.export import export_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


def test_transformers_loads_an_exported_directory_and_agrees_on_a_picture_row(tmp_path: Path):
    source = vision_model_directory(tmp_path / "vl", weights=True, max_pixels=84 * 84)
    exported = tmp_path / "exported"
    export_checkpoint(source, exported)
    picture = blocks(150, 100, seed=1)

    def question(image: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]

    ours = erniekit.load_processor(exported)(question(picture), add_generation_prompt=True)
    processor = transformers.AutoProcessor.from_pretrained(exported)
    theirs = processor.apply_chat_template(
        question(Image.fromarray(picture)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        images_kwargs={"device": "cpu"},
    )
    for name in ("input_ids", "image_grid_thw", "mm_token_type_ids"):
        np.testing.assert_array_equal(theirs[name].numpy(), ours[name])
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    given = {name: torch.tensor(ours[name]) for name in theirs if name in ours}
    with torch.no_grad(), paddle.no_grad():
        expected = model(**given).logits.numpy()
        found = erniekit.load_model(str(exported))(**ours).numpy()
    np.testing.assert_allclose(found, expected, **LOGIT_TOLERANCE)
