"""The preference losses against TRL's own code on other numbers than the committed ones. Skipped where it is absent."""

import numpy as np
import paddle
import pytest
from parity.support import load_tool

from erniekit.losses import preference_loss

pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_and_gradients_agree_with_trl(seed):
    tool = load_tool("make_preference_fixture")
    drawn = tool.draw(seed, num_pairs=20)
    for case, (_, _, options) in tool.CASES.items():
        expected = tool.reference(case, drawn)
        logps = [
            paddle.to_tensor(np.float32([sum(x) for x in drawn[f"{who}_{side}"]]), stop_gradient=who == "ref")
            for who in ("policy", "ref")
            for side in ("chosen", "rejected")
        ]
        lengths = [paddle.to_tensor([len(x) for x in drawn[f"policy_{side}"]]) for side in ("chosen", "rejected")]
        loss, _, _ = preference_loss(
            *logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **({"beta": tool.BETA} | options)
        )
        loss.sum().backward()
        np.testing.assert_allclose(loss.numpy(), expected["loss"], rtol=5e-5, atol=1e-6, err_msg=case)  # fp32
        for ours, side in zip(logps[:2], ("chosen", "rejected"), strict=True):
            np.testing.assert_allclose(ours.grad.numpy(), expected[f"d_{side}"], rtol=2e-4, atol=1e-6, err_msg=case)
