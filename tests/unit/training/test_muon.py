"""Muon against numpy in float64; what is one matrix; its state."""

from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.vision_directories import vision_config

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.parallelize import placements
from erniekit.nn.roles import Role, named_roles
from erniekit.parallel.memory import state_bytes
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.zero import ShardedParameters
from erniekit.training.adamw import POWERS, AdamW, ParamRule, parameter_rules
from erniekit.training.moment_codes import MOMENTS
from erniekit.training.moments import MomentDtype
from erniekit.training.muon import MatrixLayout, Muon, MuonOptions, matrix_layouts, orthogonalised

LR, MOMENTUM = 1e-2, 0.9


def newton_schulz(u: np.ndarray, steps: int = 5) -> np.ndarray:
    """Jordan et al. 2024, in float64, by the singular value decomposition: the polynomial acts on singular values."""
    p, s, q = np.linalg.svd(u, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return p * s @ q


def reference(w: np.ndarray, gradients: list[np.ndarray], widths: tuple[int, ...], decay: float, version: int = 3):
    """A weight [in, out] after a step with each gradient."""
    w, m = w.astype(np.float64), np.zeros(w.shape)
    edges = np.cumsum(widths)[:-1]
    for g in gradients:
        m = MOMENTUM * m + (1 - MOMENTUM) * g
        u = MOMENTUM * m + (1 - MOMENTUM) * g
        parts = []
        for part in np.split(u, edges, axis=1):
            rows, columns = part.shape
            scale = {1: max(1.0, columns / rows), 2: columns / rows, 3: max(rows, columns)}[version] ** 0.5
            parts.append(0.2 * scale * newton_schulz(part))
        w = w - LR * decay * w - LR * np.concatenate(parts, axis=1)
    return w


def parameter(values: np.ndarray) -> paddle.Tensor:
    tensor = paddle.create_parameter(list(values.shape), "float32")
    tensor.set_value(values.astype(np.float32))
    return tensor


def muon(p: paddle.Tensor, widths: tuple[int, ...], moment_dtype: MomentDtype = "fp32", **options: Any) -> Muon:
    parameters = ShardedParameters.single([("w", p)], one_moment=["w"])
    return Muon(
        parameters,
        {"w": ParamRule(1.0, 0.1)},
        0.9,
        0.95,
        1e-8,
        moment_dtype,
        matrices={"w": MatrixLayout(widths)},
        options=MuonOptions(momentum=MOMENTUM, **options),
    )


@pytest.mark.parametrize(
    ("shape", "widths", "version"),
    [
        ((12, 20), (20,), 3),
        ((20, 12), (12,), 1),
        ((20, 12), (12,), 2),
        ((16, 24), (8, 8, 8), 3),  # heads
        ((16, 24), (12, 6, 6), 3),  # q, k, v
        ((3, 8, 12), (6, 6), 3),  # experts, gate and up
    ],
)
def test_steps_match_the_published_algorithm(shape: tuple[int, ...], widths: tuple[int, ...], version: int):
    """Experts are matrices of their own. 2e-5: fp32 against float64 through five steps of cubic growth, on updates of
    about 0.01.
    """
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=shape), list(rng.normal(size=(4, *shape)))
    p = parameter(start)
    optimizer = muon(p, widths, version=version)
    for gradient in gradients:
        optimizer.step({"w": paddle.to_tensor(gradient.astype(np.float32))}, LR)
    if len(shape) == 2:
        expected = reference(start, gradients, widths, 0.1, version)
    else:
        expected = np.stack([reference(w, [g[e] for g in gradients], widths, 0.1) for e, w in enumerate(start)])
    np.testing.assert_allclose(p.numpy(), expected, atol=2e-5)
    assert sorted(optimizer.state["w"]) == ["momentum"]


def test_singular_values_come_near_one():
    """Those that are at least a hundredth of the norm; zeros stay zeros."""
    rng = np.random.default_rng(1)
    p, q = (np.linalg.qr(rng.normal(size=(size, 16)))[0] for size in (24, 40))
    x = (p * np.geomspace(1, 0.02, 16)) @ q.T
    made = np.linalg.svd(orthogonalised(paddle.to_tensor(x.astype(np.float32)), 5).numpy(), compute_uv=False)[:16]
    assert made.min() > 0.65 and made.max() < 1.2
    assert not orthogonalised(paddle.zeros([2, 4, 6]), 5).numpy().any()  # an expert without tokens


@pytest.mark.parametrize(("moment_dtype", "tolerance"), [("bf16", 0.02), ("8bit", 0.05)])
def test_momentum_may_be_stored_in_fewer_bits(moment_dtype: MomentDtype, tolerance: float):
    """Relative to the distance moved; rounding is at random."""
    rng = np.random.default_rng(2)
    start, gradients = rng.normal(size=(64, 80)), list(rng.normal(size=(6, 64, 80)))
    p = parameter(start)
    optimizer = muon(p, (80,), moment_dtype)
    for step, gradient in enumerate(gradients):
        optimizer.step({"w": paddle.to_tensor(gradient.astype(np.float32))}, LR, seed=step)
    expected = reference(start, gradients, (80,), 0.1)
    moved = np.linalg.norm(p.numpy() - expected) / np.linalg.norm(expected - start)
    assert 0 < moved < tolerance
    entries = optimizer.parameters.entries.values()
    assert optimizer.state_bytes() == state_bytes(entries, moment_dtype=moment_dtype)


def build(model: CausalLM, **keys: Any) -> tuple[AdamW, dict[str, MatrixLayout]]:
    cfg = config.load(None, {"output_dir": "unused", "optim": "muon", **keys}, "export")
    mesh = Mesh.single()
    matrices = matrix_layouts(model, cfg, mesh)
    named = list(model.named_parameters())
    parameters = ShardedParameters(named, placements(model, mesh, False), one_moment=matrices)
    options = MuonOptions.from_config(cfg)
    return Muon(parameters, parameter_rules(model, cfg), 0.9, 0.95, 1e-8, matrices=matrices, options=options), matrices


def test_which_parameters_are_muons_and_what_their_matrices_are():
    model = tiny_model("moe")
    heads = model.config.head_dim
    optimizer, matrices = build(model)
    roles = named_roles(model)
    assert matrices.keys() == {name for name, _ in model.named_parameters() if roles[name] is Role.PROJECTION}
    assert matrices and not any("embed" in name or "gate.weight" in name or "head" in name for name in matrices)
    for name, fields in optimizer.state.items():
        assert set(fields) == ({"momentum"} if name in matrices else {*MOMENTS, *POWERS})
    qkv, up_gate = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.experts.up_gate_proj.weight"
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert set(matrices[qkv].widths) == {heads} and sum(matrices[qkv].widths) == shapes[qkv][-1]
    assert matrices[up_gate].widths == (shapes[up_gate][-1],)
    _, matrices = build(model, muon_qkv_update_mode="split_qkv", muon_ffn_split=True)
    assert len(matrices[qkv].widths) == 3 and matrices[up_gate].widths == (shapes[up_gate][-1] // 2,) * 2
    _, matrices = build(model, muon_qkv_update_mode="fused_qkv")
    assert matrices[qkv].widths == (shapes[qkv][-1],)


def test_frozen_parameters_are_nobodys():
    model = tiny_model("dense")
    frozen = model.model.layers[0].self_attn.qkv_proj.weight
    frozen.stop_gradient = True
    optimizer, matrices = build(model)
    assert "model.layers.0.self_attn.qkv_proj.weight" not in optimizer.state.keys() | matrices.keys()


def test_heads_of_the_vision_transformer():
    model = CausalLM(ModelConfig.from_dict(vision_config()))
    _, matrices = build(model)
    vision = model.config.vision
    assert vision is not None
    assert matrices["model.vision_model.blocks.0.attn.qkv.weight"].widths == (vision.head_dim,) * 3 * vision.num_heads
    _, matrices = build(model, muon_qkv_update_mode="split_qkv")
    assert matrices["model.vision_model.blocks.0.attn.qkv.weight"].widths == (vision.hidden_size,) * 3


def test_state_comes_back():
    """Continued from its arrays, an optimizer goes the same way bit for bit."""
    rng = np.random.default_rng(3)
    start, gradients = rng.normal(size=(8, 12)), rng.normal(size=(4, 8, 12)).astype(np.float32)
    p = parameter(start)
    one = muon(p, (12,))
    for gradient in gradients[:2]:
        one.step({"w": paddle.to_tensor(gradient)}, LR)
    half, arrays = p.numpy().copy(), {key: one.state_array(key) for key in one.state_shapes()}
    for gradient in gradients[2:]:
        one.step({"w": paddle.to_tensor(gradient)}, LR)
    q = parameter(half)
    other = muon(q, (12,))
    for key, array in arrays.items():
        other.load_state_array(key, array)
    for gradient in gradients[2:]:
        other.step({"w": paddle.to_tensor(gradient)}, LR)
    np.testing.assert_array_equal(q.numpy(), p.numpy())
    assert arrays.keys() == {"w/momentum"}
