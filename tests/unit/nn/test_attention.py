"""Document attention against a dense masked softmax in numpy."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient, numeric_slope

from erniekit.nn import attention
from erniekit.nn.attention import HeadLayout, PackedAttention, SelfAttention
from erniekit.nn.attention_mask import make_plan
from erniekit.nn.rotary import Rotary

THETA = 10000.0
GQA, MHA, MQA = HeadLayout(4, 2, 4), HeadLayout(3, 3, 4), HeadLayout(6, 1, 8)


def dense(qkv: np.ndarray, segments: np.ndarray, positions: np.ndarray, heads: HeadLayout) -> np.ndarray:
    """[T, (H+2G)*d] -> [T, H*d], one head and one query at a time over the tokens that it may see."""
    tokens, h, g, d = len(qkv), heads.num_heads, heads.num_kv_heads, heads.dim
    z = qkv.reshape(tokens, h + 2 * g, d)
    angle = positions.reshape(-1, 1) * THETA ** (-np.arange(0, d, 2) / d)
    turned = (z[..., 0::2] + 1j * z[..., 1::2]) * np.exp(1j * angle)[:, None]
    turned = np.stack([turned.real, turned.imag], -1).reshape(z.shape)
    row, segment = np.indices(segments.shape)[0].reshape(-1), segments.reshape(-1)
    sees = (row[:, None] == row) & (segment[:, None] == segment) & (np.arange(tokens)[:, None] >= np.arange(tokens))
    out = np.empty((tokens, h, d))
    for head in range(h):
        q, k, v = turned[:, head], turned[:, h + head // (h // g)], z[:, h + g + head // (h // g)]
        scores = np.where(sees, q @ k.T / np.sqrt(d), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v
    return out.reshape(tokens, h * d)


def documents(segments: np.ndarray, positions: np.ndarray, heads: HeadLayout) -> PackedAttention:
    rotation = Rotary(heads.dim, THETA).at(
        positions.reshape(-1), heads.num_heads + heads.num_kv_heads, heads.num_kv_heads
    )
    return PackedAttention(make_plan(segments), rotation, heads)


def restarting(segments: np.ndarray) -> np.ndarray:
    return make_plan(segments).position_in_document.reshape(segments.shape)


def run(
    qkv: np.ndarray, segments: np.ndarray, heads: HeadLayout, upstream: np.ndarray, positions: np.ndarray | None = None
):
    """(context, d qkv) of our attention."""
    x = paddle.to_tensor(qkv.astype(np.float32), stop_gradient=False)
    y = documents(segments, restarting(segments) if positions is None else positions, heads).attend(x, 0)
    (y * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    return y.numpy(), x.grad.numpy()


def ids(*rows: list[int], padding: int = 0) -> np.ndarray:
    return np.stack(
        [np.concatenate([np.repeat(np.arange(1, len(row) + 1), row), np.zeros(padding, int)]) for row in rows]
    )


SMALL = {
    "one": ids([1]),
    "row": ids([6]),
    "rows": ids([5], [5]),
    "packed": ids([3, 1, 4], [2, 5, 1]),
    "equal": ids([4, 4]),
    "padded": ids([3, 2], [1, 4], padding=3),
}


@pytest.mark.parametrize("heads", [GQA, MHA, MQA], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("case", SMALL)
def test_values_and_every_gradient_follow_the_dense_formula(case: str, heads: HeadLayout):
    random = np.random.default_rng(0)
    segments = SMALL[case]
    qkv = random.normal(size=(segments.size, heads.total * heads.dim))
    upstream = random.normal(size=(segments.size, heads.num_heads * heads.dim))
    positions = restarting(segments)
    context, gradient = run(qkv, segments, heads, upstream)
    np.testing.assert_allclose(context, dense(qkv, segments, positions, heads), rtol=1e-4, atol=1e-5)
    if heads is not MQA:
        expected = numeric_gradient(lambda x: dense(x, segments, positions, heads), [qkv], 0, upstream)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("lengths", [[255], [256], [257], [511, 1], [513], [300, 256, 212], [40] * 7 + [300]], ids=str)
def test_blocks_of_queries_join_without_a_seam(lengths: list[int]):
    """Around the borders of the blocks of 256 queries, and with buckets of several lengths."""
    random = np.random.default_rng(1)
    segments = ids(lengths)
    positions = restarting(segments)
    qkv = random.normal(size=(segments.size, GQA.total * GQA.dim))
    upstream = random.normal(size=(segments.size, GQA.num_heads * GQA.dim))
    context, gradient = run(qkv, segments, GQA, upstream)
    np.testing.assert_allclose(context, dense(qkv, segments, positions, GQA), rtol=1e-3, atol=2e-5)
    for _ in range(3):
        along = random.normal(size=qkv.shape)
        slope = numeric_slope(lambda x: dense(x, segments, positions, GQA), qkv, along, upstream)
        assert (gradient * along).sum() == pytest.approx(slope, rel=1e-3, abs=1e-2)


def test_weights_computed_again_in_the_backward_pass_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    """Long documents do not keep their weights: memory would grow with the square of the length."""
    random = np.random.default_rng(1)
    segments = ids([300, 40])
    qkv = random.normal(size=(340, GQA.total * GQA.dim))
    upstream = random.normal(size=(340, GQA.num_heads * GQA.dim))
    kept = run(qkv, segments, GQA, upstream)
    monkeypatch.setattr(attention, "_KEEP_WEIGHTS", 100)
    again = run(qkv, segments, GQA, upstream)
    np.testing.assert_array_equal(again[0], kept[0])
    np.testing.assert_array_equal(again[1], kept[1])


def test_packed_documents_equal_the_same_documents_alone():
    random = np.random.default_rng(2)
    lengths = [5, 17, 1, 30, 9, 258]
    qkv = random.normal(size=(sum(lengths), GQA.total * GQA.dim))
    upstream = random.normal(size=(sum(lengths), GQA.num_heads * GQA.dim))
    context, gradient = run(qkv, ids(lengths), GQA, upstream)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone, alone_gradient = run(qkv[part], ids([length]), GQA, upstream[part])
        np.testing.assert_allclose(context[part], alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[part], alone_gradient, rtol=1e-4, atol=1e-6)
        begin += length


def test_a_token_is_blind_to_later_tokens_other_documents_and_padding():
    random = np.random.default_rng(3)
    segments = ids([4, 5], padding=3)
    qkv = random.normal(size=(12, GQA.total * GQA.dim))
    upstream = np.ones((12, GQA.num_heads * GQA.dim))
    before, _ = run(qkv, segments, GQA, upstream)
    changed = qkv.copy()
    changed[6:] += 10.0  # from the third token of the second document on
    after, _ = run(changed, segments, GQA, upstream)
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (np.abs(before[6:9] - after[6:9]).max(-1) > 1e-3).all()


def test_padding_gets_and_gives_no_gradient_beyond_its_own():
    """Short documents are padded with token 0 inside the computation: token 0 must not feel it."""
    random = np.random.default_rng(4)
    qkv = random.normal(size=(20, GQA.total * GQA.dim))
    upstream = random.normal(size=(20, GQA.num_heads * GQA.dim))
    upstream[0] = 1e3  # would leak into other documents
    lengths = [9, 11]  # one bucket, so the first is padded
    assert len(make_plan(ids(lengths)).buckets) == 1 or pytest.fail("choose lengths that share a bucket")
    _, gradient = run(qkv, ids(lengths), GQA, upstream)
    _, alone = run(qkv[:9], ids([9]), GQA, upstream[:9])
    np.testing.assert_allclose(gradient[:9], alone, rtol=1e-4, atol=1e-4)


def test_offset_positions_turn_and_do_not_mask():
    random = np.random.default_rng(5)
    segments = ids([4, 4])
    qkv = random.normal(size=(8, GQA.total * GQA.dim))
    upstream = random.normal(size=(8, GQA.num_heads * GQA.dim))
    offset = np.array([[7, 9, 10, 50, 3, 2, 1, 0]])
    context, gradient = run(qkv, segments, GQA, upstream, offset)
    np.testing.assert_allclose(context, dense(qkv, segments, offset, GQA), rtol=1e-4, atol=1e-5)
    expected = numeric_gradient(lambda x: dense(x, segments, offset, GQA), [qkv], 0, upstream)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-5)


def test_large_scores_do_not_overflow_and_reveal_nothing():
    """Scores of 1e5: no later token may outbid its mask."""
    qkv = np.random.default_rng(6).normal(size=(10, GQA.total * GQA.dim)) * 300.0
    segments = ids([10])
    context, gradient = run(qkv, segments, GQA, np.ones((10, GQA.num_heads * GQA.dim)))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(context, dense(qkv, segments, restarting(segments), GQA), rtol=1e-3, atol=0.1)


def test_inputs_are_left_alone():
    qkv = np.random.default_rng(7).normal(size=(9, GQA.total * GQA.dim)).astype(np.float32)
    x = paddle.to_tensor(qkv, stop_gradient=False)
    segments = ids([9])
    mixer = documents(segments, restarting(segments), GQA)
    (mixer.attend(x, 0) * 1.0 + mixer.attend(x, 1) * 2.0).sum().backward()
    np.testing.assert_array_equal(x.numpy(), qkv)
    _, once = run(qkv, segments, GQA, np.ones((9, GQA.num_heads * GQA.dim)))
    np.testing.assert_allclose(x.grad.numpy(), 3 * once, rtol=1e-4, atol=1e-5)


def test_no_gradient_mode_gives_the_same_context():
    qkv = np.random.default_rng(8).normal(size=(300, GQA.total * GQA.dim)).astype(np.float32)
    segments = ids([280, 20])
    with_grad, _ = run(qkv, segments, GQA, np.ones((300, GQA.num_heads * GQA.dim)))
    with paddle.no_grad():
        without = documents(segments, restarting(segments), GQA).attend(paddle.to_tensor(qkv), 0).numpy()
    np.testing.assert_array_equal(with_grad, without)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_projects_attends_and_projects(bias: bool):
    paddle.seed(0)
    layer = SelfAttention(12, GQA, bias=bias, init_std=0.3)
    segments = ids([3, 4])
    x = np.random.default_rng(9).normal(size=(7, 12)).astype(np.float32)
    if bias:
        layer.qkv_proj.bias.set_value(
            np.random.default_rng(1).normal(size=layer.qkv_proj.bias.shape).astype(np.float32)
        )
        layer.o_proj.bias.set_value(np.random.default_rng(2).normal(size=12).astype(np.float32))
    y = layer(paddle.to_tensor(x), documents(segments, restarting(segments), GQA), 0).numpy()
    weights = {name: np.float64(p.numpy()) for name, p in layer.named_parameters()}
    qkv = x @ weights["qkv_proj.weight"] + weights.get("qkv_proj.bias", 0.0)
    context = dense(qkv, segments, restarting(segments), GQA)
    np.testing.assert_allclose(
        y, context @ weights["o_proj.weight"] + weights.get("o_proj.bias", 0.0), rtol=1e-3, atol=1e-5
    )
