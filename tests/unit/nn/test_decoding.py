"""What decoding steps compute otherwise gives the same numbers to within rounding, and only there."""

import threading
from collections.abc import Callable

import numpy as np
import paddle
import pytest

from erniekit.losses import lm
from erniekit.losses.lm import Head
from erniekit.nn import cpu_norm, cpu_ops, decoding, kv_cache, mkl, token_attention
from erniekit.nn.attention import HeadLayout
from erniekit.nn.grouped import grouped_matmul
from erniekit.nn.linear import Linear
from erniekit.nn.mlp import gated, swiglu
from erniekit.nn.nodes import call
from erniekit.nn.norm import rms_norm
from erniekit.nn.rotary import Rotary
from erniekit.utils import runtime


def both(function: Callable[[], paddle.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """In a decoding step, and outside."""
    with paddle.no_grad():
        outside = function().numpy()
    with decoding.running():
        inside = function().numpy()
    return inside, outside


def assert_close(pair: tuple[np.ndarray, np.ndarray]) -> None:
    # Other orders of summing up to 300 fp32 numbers of size 1.
    np.testing.assert_allclose(*pair, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_norm_and_activations(rows: int):
    paddle.seed(1)
    x, weight = paddle.randn([rows, 128]) * 3, paddle.randn([128])
    assert_close(both(lambda: rms_norm(x, weight, 1e-5)))
    assert_close(both(lambda: swiglu(x)))
    projection = Linear(128, 64)
    assert_close(both(lambda: gated(projection, x)))
    # Powers that overflow: silu(-200) = -0, silu(200) = 200.
    extreme = paddle.to_tensor(np.tile(np.float32([-200, 200, -88.8, 0, 1, 2, 3, 4]), (rows, 600)))
    inside, outside = both(lambda: swiglu(extreme))
    assert np.isfinite(inside).all()
    np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("rows", [1, 5, 2100])
def test_norm_without_avx512(rows: int, monkeypatch: pytest.MonkeyPatch):
    """There Paddle's own operation would end the process."""
    monkeypatch.setattr(runtime, "has_avx512", lambda: False)
    monkeypatch.setattr(cpu_norm, "incubate", None)
    paddle.seed(1)
    x, weight = paddle.randn([rows, 128]) * 3, paddle.randn([128])
    assert_close(both(lambda: rms_norm(x, weight, 1e-5)))


def test_products_of_sorted_rows():
    rows, weight = paddle.randn([12, 16]), paddle.randn([5, 16, 24])
    assert_close(both(lambda: grouped_matmul(rows, weight, [3, 0, 8, 1, 0])))
    assert both(lambda: grouped_matmul(rows[:0], weight, [0] * 5))[0].shape == (0, 24)


@pytest.mark.parametrize("rows", [3, 9])
def test_a_head_that_is_a_large_embedding(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm, "_LARGE_EMBEDDING", 1)
    hidden, head = paddle.randn([rows, 64]), Head(paddle.randn([300, 64]), by_vocab=True, bias=paddle.randn([300]))
    assert_close(both(lambda: head.logits(hidden)))


def test_products_of_many_sizes():
    if not mkl.is_available():
        pytest.skip("Paddle's wheel has no MKL here")
    random = np.random.default_rng(0)
    rows, columns, inner = np.array([1, 3, 2]), np.array([4, 1, 6]), np.array([5, 2, 7])
    for transpose in (False, True):
        x = random.normal(size=(3, 3, 8)).astype(np.float32)
        y = random.normal(size=(3, 8, 8)).astype(np.float32)
        out = np.full((3, 3, 8), 7, np.float32)
        places = [mkl.addresses(mkl.address_of(each), 3, each[0].size) for each in (x, y, out)]
        mkl.Products(rows, columns, inner, (8, 8, 8), transpose).run(*places)
        expected = np.full_like(out, 7)  # what is outside a product stays as it is
        for place, (r, c, k) in enumerate(zip(rows, columns, inner, strict=True)):
            right = y[place, :c, :k].T if transpose else y[place, :k, :c]
            expected[place, :r, :c] = x[place, :r, :k] @ right
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filling", [0, 2])
def test_attention_of_one_token_a_row_is_that_of_the_plain_operations(filling: int, monkeypatch: pytest.MonkeyPatch):
    heads, batch = HeadLayout(6, 2, 8), 4
    projections = [paddle.randn([batch * 9, heads.total * heads.dim]) * 2]
    projections += [paddle.randn([batch + filling, heads.total * heads.dim]) * 2 for _ in range(3)]

    def run(is_plain: bool) -> list[np.ndarray]:
        monkeypatch.setattr(mkl, "is_available", lambda: not is_plain)
        cache, made = kv_cache.KVCache(1, batch, heads, Rotary(8, 10000.0), capacity=10), []
        with decoding.running():
            for qkv, new in zip(projections, ([9, 1, 5, 8], [1] * 4, [1] * 4, [1] * 4), strict=True):
                cache.begin_step(9 if qkv is projections[0] else 1)
                assert token_attention.applies(qkv) is not is_plain
                made.append(cache.attend(qkv, 0).numpy())
                cache.end_step(new)
        return made

    if not mkl.is_available():
        pytest.skip("Paddle's wheel has no MKL here")
    for found, expected in zip(run(False), run(True), strict=True):
        assert_close((found, expected))


def test_it_is_declared_for_one_thread_and_ends_with_an_error():
    seen: list[bool] = []
    with pytest.raises(ValueError, match="stop"), decoding.running():
        assert decoding.is_running() and not paddle.is_grad_enabled()
        thread = threading.Thread(target=lambda: seen.append(decoding.is_running()))
        thread.start()
        thread.join()
        raise ValueError("stop")
    assert seen == [False] and not decoding.is_running() and paddle.is_grad_enabled()


def test_a_node_is_recorded_only_with_gradients():
    class Twice(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    x = paddle.ones([2])
    x.stop_gradient = False
    call(Twice, x).sum().backward()
    assert x.grad.tolist() == [2, 2]
    with paddle.no_grad():
        assert call(Twice, x).tolist() == [2, 2] and call(Twice, x).stop_gradient


def test_a_few_rows_of_an_empty_batch():
    with decoding.running():
        assert not cpu_ops.applies(paddle.zeros([0, 8]))
        assert rms_norm(paddle.zeros([0, 8]), paddle.ones([8]), 1e-5).shape == [0, 8]
