"""Muon beside PyTorch's, which makes momentum orthogonal in bfloat16."""

import numpy as np
import paddle
import pytest

from erniekit.parallel.zero import ShardedParameters
from erniekit.training.adamw import ParamRule
from erniekit.training.muon import MatrixLayout, Muon, MuonOptions

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity
STEPS, LR, DECAY = 6, 1e-2, 0.1


@pytest.mark.parametrize(("version", "factor", "adjust"), [(3, 0.2, "match_rms_adamw"), (1, 1.0, "original")])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_steps_are_those_of_pytorch(shape: tuple[int, int], version: int, factor: float, adjust: str):
    """Weights are [out, in] there. 2 % of the distance moved: their products are rounded to 8 bits of mantissa."""
    rng = np.random.default_rng(0)
    start, gradients = (rng.normal(size=(n, *shape)).astype(np.float32) for n in (1, STEPS))
    theirs = torch.nn.Parameter(torch.from_numpy(start[0].T.copy()))
    optimizer = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn=adjust)
    ours = paddle.create_parameter(list(shape), "float32")
    ours.set_value(start[0])
    muon = Muon(
        ShardedParameters.single([("w", ours)], one_moment=["w"]),
        {"w": ParamRule(1.0, DECAY)},
        0.9,
        0.95,
        1e-8,
        matrices={"w": MatrixLayout((shape[1],))},
        options=MuonOptions(version=version, extra_scale_factor=factor),
    )
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient.T.copy())
        optimizer.step()
        muon.step({"w": paddle.to_tensor(gradient)}, LR)
    expected = theirs.detach().numpy().T
    moved = np.linalg.norm(ours.numpy() - expected) / np.linalg.norm(expected - start[0])
    print(f"{shape}, {adjust}: {moved:.2e}")
    assert moved < 0.02
