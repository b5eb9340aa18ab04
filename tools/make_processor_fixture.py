"""Rebuild tests/parity/fixtures/vl_processor.npz from transformers' processor of ERNIE 4.5 VL (needs torch, torchvision
and transformers).

    python tools/make_processor_fixture.py [--out FILE]

A conversation with two pictures and a video goes through transformers' processor, which is loaded by AutoProcessor from
a directory that erniekit's processor saved; pictures through its Pillow backend. The archive has the arrays under the
names that the processor gives them. The pictures are made by tests/support/pictures.py, and the test makes them again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoProcessor
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.pictures import PROCESSOR_CASE, processor_media, vision_directory  # noqa: E402

from erniekit.data.vision.processor import load_processor  # noqa: E402

OUT = ROOT / "tests" / "parity" / "fixtures" / "vl_processor.npz"
TOKENS = {
    f"{kind}_{role}token": f"<|{kind.upper()}_{name}|>"
    for kind in ("image", "video")
    for role, name in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))
}


def main() -> None:
    """Write the archive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    directory = Path(tempfile.mkdtemp())
    try:
        arrays = compute(directory)
    finally:
        shutil.rmtree(directory)
    np.savez_compressed(out, **arrays)
    print(f"{out}: {', '.join(f'{name} {list(value.shape)}' for name, value in arrays.items())}")


def compute(directory: Path) -> dict[str, np.ndarray]:
    """What transformers' processor makes of the case."""
    ours = load_processor(vision_directory(directory))
    ours.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    config = {key: value for key, value in config.items() if key not in ("chat_template", "additional_special_tokens")}
    config |= {"extra_special_tokens": TOKENS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "config.json").write_text(json.dumps({"model_type": "ernie4_5_vl_moe"}), "utf-8")
    theirs = AutoProcessor.from_pretrained(directory)
    theirs.image_processor = Ernie4_5_VLMoeImageProcessorPil.from_pretrained(directory)
    text = ours.template.render(PROCESSOR_CASE, add_generation_prompt=True)
    for kind in ("image", "video"):
        text = text.replace(f"<|{kind}@placeholder|>", f"<|{kind.upper()}_PLACEHOLDER|>")
    images, videos = processor_media()
    result = theirs(
        text=[text], images=[Image.fromarray(image) for image in images], videos=videos, return_tensors="np"
    )
    return {name: np.asarray(value) for name, value in result.items()}


if __name__ == "__main__":
    main()
