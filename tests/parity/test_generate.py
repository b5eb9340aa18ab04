"""`model.generate` gives transformers' tokens, token for token."""

from pathlib import Path

import numpy as np
import pytest

from erniekit.build import load_model
from erniekit.generation.generate import generate

pytestmark = pytest.mark.parity
FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [20, 21, 22, 23]]


@pytest.mark.parametrize("name", ["dense_tied", "moe_untied"])
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.5}, {"min_new_tokens": 6, "eos_token_id": list(range(2, 40))}]
)
def test_greedy_generation(name: str, options: dict[str, object]):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    width = max(len(prompt) for prompt in PROMPTS)
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = (np.arange(width) >= width - np.array([[len(prompt)] for prompt in PROMPTS])).astype(np.int64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    # Unlike ours, their repetition penalty counts the padding too, if there is any; so they answer prompt by prompt.
    expected = [
        theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=15, pad_token_id=0, **options)[0]
        for prompt in PROMPTS
    ]
    found = generate(load_model(FIXTURES / name), ids, mask, max_new_tokens=15, **options).numpy()
    for row, prompt, tokens in zip(found, PROMPTS, expected, strict=True):
        answer = tokens[len(prompt) :].tolist()
        assert row[width:].tolist() == answer + [0] * (found.shape[1] - width - len(answer))
