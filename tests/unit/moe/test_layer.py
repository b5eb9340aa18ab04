"""Ways of routing beyond plain top-k: sigmoid gates, groups, capacity, two modalities; what is counted of them."""

import numpy as np
import paddle
import pytest

from erniekit.moe.expert_bias import update_biases
from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo
from erniekit.moe.router import RouterOptions, choose, route, within_capacity
from erniekit.moe.stats import measure

RNG = np.random.default_rng(11)


def tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array.astype(np.float32))


def layer(options: RouterOptions, widths: tuple[int, ...] = (5,), num_shared: int = 1, seed: int = 0) -> MoELayer:
    paddle.seed(seed)
    return MoELayer(MoESizes(6, widths, 4, num_shared, bias=False, init_std=0.5), options)


def test_a_sigmoid_gate_scores_each_expert_by_itself():
    logits = RNG.normal(size=(5, 4))
    routing = route(tensor(logits), paddle.zeros([4]), RouterOptions(2, act="sigmoid"))
    scores = 1 / (1 + np.exp(-logits))
    best = np.sort(scores, axis=-1)[:, :1:-1]
    np.testing.assert_allclose(routing.weights.numpy(), best / best.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(routing.probs.numpy().sum(-1), 1.0, rtol=1e-5)


def test_grouped_routing_chooses_the_best_expert_of_each_group():
    scores = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert choose(tensor(scores), RouterOptions(2)).numpy().tolist() == [[0, 1], [3, 2]]
    assert choose(tensor(scores), RouterOptions(2, grouped=True)).numpy().tolist() == [[0, 2], [1, 3]]


def test_capacity_keeps_the_first_tokens_of_each_row():
    experts = np.array([[0, 1], [0, 1], [0, 2], [0, 3], [0, 1], [2, 3]])
    # Row one: 4 tokens, 8 pairs over 4 experts, capacity 1: 2 places each. Row two: 2 tokens, 4 pairs: 1 place each.
    keep = within_capacity(experts, 4, 1.0, [4, 2])
    assert keep.tolist() == [[True, True], [True, True], [False, True], [False, True], [True, True], [True, True]]


def test_dropped_pairs_add_nothing_and_are_counted_and_rows_are_apart():
    """The same tokens in one batch of two rows, and row by row: the same output, the same drops."""
    options = RouterOptions(2, capacity=0.5)
    moe = layer(options, num_shared=0)
    moe.train()
    x = tensor(RNG.normal(size=(12, 6)))
    whole, decided = moe(x, TokenInfo([7, 5]))
    parts = [moe(part, TokenInfo([len(part)])) for part in (x[:7], x[7:])]
    np.testing.assert_allclose(whole.numpy(), np.concatenate([y.numpy() for y, _ in parts]), atol=1e-6)
    dropped = sum(d[0].dropped for _, d in parts)
    assert decided[0].dropped == dropped > 0
    moe.eval()
    free, decided = moe(x, TokenInfo([7, 5]))
    assert decided[0].dropped == 0 and not np.allclose(free.numpy(), whole.numpy())


def test_gradients_flow_around_dropped_pairs():
    moe = layer(RouterOptions(2, capacity=0.5), num_shared=0)
    moe.train()
    x = tensor(RNG.normal(size=(8, 6)))
    x.stop_gradient = False
    y, _ = moe(x, TokenInfo([8]))
    (y * tensor(RNG.normal(size=(8, 6)))).sum().backward()
    assert np.isfinite(x.grad.numpy()).all() and x.grad.numpy().any()


@pytest.fixture
def two() -> MoELayer:
    return layer(RouterOptions(2), widths=(5, 3))


def test_each_modality_has_its_own_router_and_experts(two: MoELayer):
    """A mixed batch is what each modality's tokens give alone through a layer that holds only its weights."""
    x, modality = RNG.normal(size=(9, 6)), np.array([0, 1, 1, 0, 0, 1, 0, 0, 1])
    mixed, decided = two(tensor(x), TokenInfo([5, 4], modality))
    assert set(decided) == {0, 1}
    for which, width in ((0, 5), (1, 3)):
        alone = layer(RouterOptions(2), widths=(width,), num_shared=0)
        alone.gate.weight.set_value(two.gate.matrix(which))
        experts = two.vision_experts if which else two.experts
        alone.experts.set_state_dict(experts.state_dict())
        part = tensor(x[modality == which])
        expected = alone(part, TokenInfo([len(part)]))[0] + two.shared_experts(part)
        np.testing.assert_allclose(mixed.numpy()[modality == which], expected.numpy(), atol=1e-5)
    assert decided[0].row_lengths == [3, 2] and decided[1].row_lengths == [2, 2]


def test_text_alone_runs_nothing_of_vision(two: MoELayer):
    x = tensor(RNG.normal(size=(4, 6)))
    plain, decided = two(x, TokenInfo([4]))
    typed, decided_typed = two(x, TokenInfo([4], np.zeros(4, np.int64)))
    np.testing.assert_allclose(plain.numpy(), typed.numpy(), atol=1e-6)
    assert set(decided) == set(decided_typed) == {0}


@pytest.mark.parametrize("modality", [None, np.zeros(0, np.int64)], ids=["text model", "two modalities"])
def test_without_tokens_text_has_gradients_of_zero_and_vision_has_none(two: MoELayer, modality: np.ndarray | None):
    """A batch without tokens is one row on the device, which no router sees."""
    x = tensor(RNG.normal(size=(1, 6)))
    x.stop_gradient = False
    two(x, TokenInfo([], modality))[0].sum().backward()
    gradients = {name: parameter.grad for name, parameter in two.named_parameters()}
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {"gate.weight_1", *(name for name in gradients if name.startswith("vision_experts."))}
    routed = [gradients[name] for name in gradients.keys() - without if not name.startswith("shared_experts.")]
    assert len(routed) == 3 and not any(gradient.numpy().any() for gradient in routed)


def test_each_modality_has_its_own_bias(two: MoELayer):
    update_biases({0: two}, {(0, 1): np.array([9, 1, 1, 1])}, 0.01)
    bias = two.correction_bias.numpy()
    assert not bias[0].any()
    np.testing.assert_allclose(bias[1], [-0.01, 0.01, 0.01, 0.01])


def test_router_record():
    moe = layer(RouterOptions(2))
    _, decided = moe(tensor(RNG.normal(size=(10, 6))), TokenInfo([10]))
    (first, on_device), (second, more) = (
        measure(decided[0], {"router_z": paddle.to_tensor(loss)}) for loss in (20.0, 40.0)
    )
    stats = first + second
    for name in on_device:
        stats.set_sum(name, on_device[name].item() + more[name].item())
    record = stats.record(np.array([-0.5, 0.0, 0.0, 0.25]))
    probs = decided[0].routing.probs.numpy()
    usage = np.bincount(decided[0].routing.experts.numpy().reshape(-1), minlength=4)
    assert stats.usage.tolist() == (2 * usage).tolist()
    assert record["entropy"] == pytest.approx(-(probs * np.log(probs)).sum(-1).mean(), rel=1e-5)
    assert record["load_max_over_mean"] == pytest.approx(usage.max() / 5)
    assert record["router_z"] == pytest.approx(3.0)
    assert (record["bias_min"], record["bias_max"]) == (-0.5, 0.25)
