"""Adapters on models: what they compute, what is trained, off and merged."""

import copy

import numpy as np
import paddle
import pytest
from support.adapters import randomize
from support.tiny_models import tiny_model

from erniekit import lora
from erniekit.lora.layers import LinearAdapter, Slot
from erniekit.nn.linear import Linear
from erniekit.nn.norm import RMSNorm
from erniekit.utils import log
from erniekit.utils.errors import ConfigError

IDS = np.arange(20).reshape(2, 10) * 3 % 61


@pytest.fixture(params=["dense", "moe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())


def test_a_new_adapter_changes_nothing_and_trains_alone(kind: str) -> None:
    model = tiny_model(kind)
    base = model(IDS).numpy()
    state = lora.attach(model, lora.LoraOptions(rank=4), tied=True)
    assert np.array_equal(model(IDS).numpy(), base)
    trained = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    assert trained and all(".adapter." in name for name in trained)
    assert lora.state_of(model) is state
    model(IDS).sum().backward()
    # At first B is 0, so A has a zero gradient, and B has one.
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == set(trained)
    assert all((largest(gradient.numpy()) == 0) == (".A" in name) for name, gradient in gradients.items())


def test_a_rank_above_every_width_is_a_warning_and_an_absurd_one_an_error() -> None:
    shapes = {"a.q_proj.weight": (32, 16), "a.experts.down_proj.weight": (8, 24, 48), "lm_head.weight": (32, 999)}
    slots = ["a.q_proj", "a.experts.down_proj"]
    with log.captured() as lines:
        lora.check_rank(24, slots, shapes)
    assert lines == []
    with log.captured() as lines:
        lora.check_rank(25, slots, shapes)
    [(is_warning, text)] = lines
    assert is_warning and "lora_rank: 25 is above the width" in text and "a.experts.down_proj with 24" in text
    with pytest.raises(ConfigError, match=r"lora_rank: 1000000 .* Set lora_rank to at most 24"):
        lora.check_rank(1_000_000, slots, shapes)


def test_start_depends_on_seed_and_name_alone() -> None:
    factors = []
    for seed in (1, 1, 2):
        paddle.seed(seed * 7)
        model = tiny_model()
        lora.attach(model, lora.LoraOptions(rank=4, seed=seed))
        factors.append({name: p.numpy() for name, p in model.named_parameters() if ".A" in name})
    one, same, other = factors
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)
    for name, a in one.items():  # uniform within 1 / sqrt(in), as PEFT's kaiming_uniform with a = sqrt(5)
        bound = a.shape[0] ** -0.5
        assert 0.9 * bound < largest(a) <= bound and abs(a.std() - bound / 3**0.5) < 0.2 * bound, name


def test_a_divided_start_is_a_share_of_the_whole_one() -> None:
    """Two ranks that hold half of a row-split layer draw the halves of what one would draw."""

    class Holder(paddle.nn.Layer):
        def __init__(self, num_in: int) -> None:
            super().__init__()
            self.norm = RMSNorm(4, 1e-5)
            self.down_proj = Linear(num_in, 6, split="row")

    def a_of(num_in: int, share: tuple[int, int]) -> np.ndarray:
        model = Holder(num_in)
        lora.attach(model, lora.LoraOptions(rank=2, targets=("down_proj",)), share=lambda cut: share)
        return model.down_proj.adapter.factors("")[0].numpy()

    whole = a_of(8, (0, 1))
    assert np.array_equal(np.concatenate([a_of(4, (0, 2)), a_of(4, (1, 2))]), whole)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_disabled(kind: str, dora: bool) -> None:
    model = tiny_model(kind)
    base = model(IDS).numpy()
    targets = ("qkv_proj", "o_proj") if dora else ("q_proj", "o_proj", "up_gate_proj", "down_proj")
    options = lora.LoraOptions(rank=3, alpha=5, dora=dora, targets=targets, modules_to_save=("norm",))
    lora.attach(model, options, tied=True)
    randomize(model)
    adapted = model(IDS).numpy()
    assert largest(adapted - base) > 0.1 * largest(base)
    with lora.disabled(model):
        assert np.array_equal(model(IDS).numpy(), base)
    assert np.array_equal(model(IDS).numpy(), adapted)
    lora.merge(model)
    assert lora.state_of(model) is None and not any(".adapter." in name for name, _ in model.named_parameters())
    assert largest(model(IDS).numpy() - adapted) < 1e-5 * largest(adapted)


def test_unload_leaves_the_base(kind: str) -> None:
    model = tiny_model(kind)
    base = model(IDS).numpy()
    lora.attach(model, lora.LoraOptions())
    randomize(model)
    lora.unload(model)
    assert np.array_equal(model(IDS).numpy(), base)
    assert not any(parameter.stop_gradient for parameter in model.parameters())


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tiny_model()
    lora.attach(model, lora.LoraOptions(dora=True))
    randomize(model)
    before = model(IDS).numpy()
    twin = copy.deepcopy(model)
    assert np.array_equal(twin(IDS).numpy(), before)
    for parameter in twin.parameters():
        parameter.set_value(parameter * 0.5)
    assert np.array_equal(model(IDS).numpy(), before)


@pytest.mark.parametrize("split", [None, "column", "row"])
@pytest.mark.parametrize("parts", [("q", "v"), ("q", "k", "v"), ("k",)])
def test_parts_against_plain_algebra(split: str | None, parts: tuple[str, ...]) -> None:
    """Ranks and scalings of their own for each part; gradients of x, A and B by paddle's own graph."""
    linear = Linear(6, 12, parts={"q": 6, "k": 4, "v": 2}, split=split)
    slots = {part: Slot(rank, 0.5 * rank) for part, rank in zip(parts, (2, 3, 4), strict=False)}
    adapter = linear.adapter = LinearAdapter(linear, slots, 0.0, False, paddle.float32)
    randomize(linear)
    x = paddle.randn([2, 3, 6])
    x.stop_gradient = False
    weights = paddle.randn([2, 3, 12])
    (linear(x) * weights).sum().backward()
    names = dict(linear.named_parameters())
    ours = {name: p.grad.numpy() for name, p in names.items()} | {"x": x.grad.numpy()}
    for tensor in (*names.values(), x):
        tensor.clear_grad()
    merged = paddle.zeros([6, 12])
    for part, (begin, end) in {"q": (0, 6), "k": (6, 10), "v": (10, 12)}.items():
        if part in slots:
            a, b = adapter.factors(part)
            delta = slots[part].scaling * paddle.matmul(a, b)
            merged = merged + paddle.concat([paddle.zeros([6, begin]), delta, paddle.zeros([6, 12 - end])], axis=1)
    (paddle.matmul(x, linear.weight + merged) * weights).sum().backward()
    for name, tensor in {**names, "x": x}.items():
        assert np.allclose(ours[name], tensor.grad.numpy(), atol=1e-5), name


def test_experts_without_rows_get_zero_gradients() -> None:
    model = tiny_model("moe")
    lora.attach(model, lora.LoraOptions(targets=("experts.down_proj",)))
    randomize(model)
    adapter = model.model.layers[1].mlp.experts.down_proj.adapter
    rows, y = paddle.randn([5, 16]), paddle.randn([5, 32])
    rows.stop_gradient = False
    adapter(rows, [2, 0, 3, 0], y).sum().backward()
    a, b = (factor.grad.numpy() for factor in adapter.factors(""))
    assert [largest(a[e]) > 0 for e in range(4)] == [largest(b[e]) > 0 for e in range(4)] == [True, False, True, False]
    empty = adapter(paddle.zeros([0, 16]), [0, 0, 0, 0], paddle.zeros([0, 32]))
    assert empty.shape == [0, 32]


def test_dropout_only_while_training_and_by_the_seed(kind: str) -> None:
    model = tiny_model(kind)
    lora.attach(model, lora.LoraOptions(dropout=0.5))
    randomize(model)
    still = model(IDS).numpy()
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        drawn.append(model(IDS).numpy())
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert largest(drawn[0] - still) > 0
    model.eval()
    assert np.array_equal(model(IDS).numpy(), still)


def test_dora_in_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="only attention can have DoRA"):
        lora.attach(tiny_model("moe"), lora.LoraOptions(dora=True))


def test_scaling() -> None:
    assert lora.LoraOptions(rank=16, alpha=8).scaling == 0.5
    assert lora.LoraOptions(rank=16, alpha=8, rslora=True).scaling == 2.0


def test_what_is_attached_in_words() -> None:
    state = lora.attach(tiny_model(), lora.LoraOptions(rank=2, alpha=3, targets=("o_proj",), modules_to_save=("norm",)))
    assert lora.describe(state) == "2 projections (o_proj), rank 2, scaling 1.5, whole: model.norm.weight"
