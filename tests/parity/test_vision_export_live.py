"""An exported vision-language model in transformers: same arrays and logits on a row with a picture. Skipped where
torch is absent.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

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

_GIVEN = ("input_ids", "attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids", "pixel_values", "image_grid_thw")


def test_transformers_loads_an_exported_directory_and_agrees_on_a_picture_row(tmp_path: Path):
    source = vision_model_directory(tmp_path / "vl", weights=True, max_pixels=84 * 84)
    exported = tmp_path / "exported"
    export_checkpoint(source, exported)
    picture = blocks(150, 100, seed=1)

    def question(image: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]

    ours = erniekit.load_processor(exported)(question(picture), add_generation_prompt=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template(question("picture"), add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    if find_spec("torchvision") is not None:  # without it transformers has no processor for this model
        _assert_same_arrays(exported, question(Image.fromarray(picture)), ours)
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    given = {name: torch.tensor(ours[name]) for name in _GIVEN}
    with torch.no_grad(), paddle.no_grad():
        expected = model(**given).logits.numpy()
        found = erniekit.load_model(str(exported))(**ours).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def _assert_same_arrays(exported: Path, messages: list[dict[str, Any]], ours: dict[str, np.ndarray]) -> None:
    """transformers' processor of the exported directory gives what ours gives."""
    theirs = transformers.AutoProcessor.from_pretrained(exported).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for name in ("input_ids", "image_grid_thw", "mm_token_type_ids", "moe_mm_token_type_ids"):
        np.testing.assert_array_equal(theirs[name].numpy(), ours[name])
    assert theirs["pixel_values"].shape == ours["pixel_values"].shape
