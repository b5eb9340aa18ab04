"""Attention dropout: what is dropped is a function of the tokens, of nothing else."""

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.nn import attention, fused
from erniekit.nn.attention import HeadLayout, PackedAttention
from erniekit.nn.attention_mask import make_plan
from erniekit.nn.dropout import AttentionDropout, DropoutStep, number_documents
from erniekit.nn.rotary import Rotary

HEADS = HeadLayout(4, 2, 4)
LAYERS, LAYER, RATE = 4, 3, 0.4
M64, M32 = (1 << 64) - 1, (1 << 32) - 1


def attention_of(
    tokens: np.ndarray,
    segments: np.ndarray,
    step: DropoutStep | None,
    prefixes: np.ndarray | None = None,
    heads: HeadLayout = HEADS,
    first_head: int = 0,
) -> PackedAttention:
    plan = make_plan(segments[None], prefixes)
    rotation = Rotary(heads.dim, 1e4).at(
        plan.position_in_document, heads.num_heads + heads.num_kv_heads, heads.num_kv_heads
    )
    dropout = None
    if step is not None:
        dropout = AttentionDropout(step, LAYERS, number_documents(tokens, plan, prefixes), first_head)
    return PackedAttention(plan, rotation, heads, dropout)


def segments_of(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)


def draw(seed: int, tokens: int, heads: HeadLayout = HEADS) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [T] and qkv [T, (H+2G)*d]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1000, tokens), rng.normal(size=(tokens, heads.total * heads.dim)).astype(np.float32)


def run(documents: PackedAttention, qkv: np.ndarray, layer: int = LAYER) -> tuple[np.ndarray, np.ndarray]:
    """The context, and the gradient of its sum weighted by cos(0), cos(1), ..."""
    x = paddle.to_tensor(qkv, stop_gradient=False)
    y = documents.attend(x, layer)
    weights = paddle.to_tensor(np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape))
    (y * weights).sum().backward()
    return y.numpy(), x.grad.numpy()


def kept(number: int, head: int, query: int, key: int, step: DropoutStep) -> bool:
    """Whether a weight is kept, one at a time in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
        return x ^ (x >> 31)

    stride, of_step, of_layer, of_head = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7, 0xABC98388FB8FAC03
    start = mix(mix((step.seed * stride + step.step * of_step) & M64) + LAYER * of_layer & M64)
    head = mix((start + head * of_head) & M64)
    row = mix((mix((number + query * stride) & M64) + head) & M64) >> 32
    column = mix((number * of_head + key * stride + of_layer) & M64) >> 32
    x = (row + column) & M32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & M32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & M32
    return (x ^ (x >> 16)) >= round(step.rate * LAYER / LAYERS * 2**32)


def dense(
    documents: PackedAttention, prefixes: np.ndarray | None, step: DropoutStep
) -> Callable[[np.ndarray], np.ndarray]:
    """qkv [T, (H+2G)*d] -> context [T, H*d] in float64, with the masks of the formula, one query and head at a time."""
    plan, table = documents.plan, documents.rotation.table.numpy().astype(np.complex128)
    places: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # query, head, the tokens that it sees, their mask
    for query, document in enumerate(plan.document_of_token):
        seen = np.flatnonzero((plan.document_of_token == document) & (np.arange(plan.num_tokens) <= query))
        if prefixes is not None and prefixes[document] >= 0:
            seen = np.concatenate([np.flatnonzero(plan.document_of_token == prefixes[document]), seen])
        number, positions = int(documents.dropout.documents[document]), plan.position_in_document
        for head in range(HEADS.num_heads):
            mask = [kept(number, head, int(positions[query]), int(positions[key]), step) for key in seen]
            places.append((query, head, seen, np.array(mask) / (1 - RATE * LAYER / LAYERS)))

    def context(qkv: np.ndarray) -> np.ndarray:
        z = qkv.reshape(len(qkv), HEADS.total, HEADS.dim)
        z = (z[..., 0::2] + 1j * z[..., 1::2]) * table
        z = np.stack([z.real, z.imag], -1).reshape(len(qkv), HEADS.total, HEADS.dim)
        out = np.zeros((len(qkv), HEADS.num_heads, HEADS.dim))
        for query, head, seen, mask in places:
            k, v = z[seen, 4 + head // 2], z[seen, 6 + head // 2]
            weights = np.exp(k @ z[query, head] / np.sqrt(HEADS.dim))
            out[query, head] = (weights / weights.sum() * mask) @ v
        return out.reshape(len(qkv), -1)

    return context


@pytest.mark.parametrize("prefixes", [None, np.array([-1, 0, 0, -1])])
def test_context_and_gradient_are_those_of_the_formula_with_its_mask(prefixes):
    tokens, qkv = draw(0, 17)
    step = DropoutStep(RATE, seed=7, step=3)
    documents = attention_of(tokens, segments_of(4, 5, 6, 2), step, prefixes)
    formula = dense(documents, prefixes, step)
    context, gradient = run(documents, qkv)
    np.testing.assert_allclose(context, formula(qkv), atol=1e-5)
    upstream = np.cos(np.arange(context.size, dtype=np.float64)).reshape(context.shape)
    np.testing.assert_allclose(gradient, numeric_gradient(formula, [qkv], 0, upstream), atol=1e-5)


def test_the_mean_over_many_seeds_is_attention_without_dropout():
    tokens, qkv = draw(1, 24)
    segments = segments_of(9, 15)
    plain, _ = run(attention_of(tokens, segments, None), qkv)
    contexts = np.stack([run(attention_of(tokens, segments, DropoutStep(RATE, s, 0)), qkv)[0] for s in range(400)])
    error = contexts.std(axis=0) / np.sqrt(len(contexts))
    assert np.abs((contexts.mean(axis=0) - plain) / np.maximum(error, 1e-4)).max() < 4.5
    assert contexts.std(axis=0).max() > 0.1


def test_the_share_of_dropped_weights_is_the_rate():
    tokens, _ = draw(2, 400)
    documents = attention_of(tokens, segments_of(400), DropoutStep(0.1, 3, 5))
    for layer, rate in ((1, 0.025), (3, 0.075)):
        mask = documents.dropout.masks(layer, documents.plan, 4, 2).block(0, 0, 256).numpy()
        deviation = np.sqrt(rate * (1 - rate) / mask.size)
        assert abs((mask == 0).mean() - rate) < 5 * deviation
        np.testing.assert_allclose(mask.max(), 1 / (1 - rate), rtol=1e-6)
        rows, columns = (mask == 0).mean(axis=-1), (mask == 0).mean(axis=-2)
        assert rows.std() < 1.3 * np.sqrt(rate / mask.shape[-1]) and columns.std() < 1.3 * np.sqrt(
            rate / mask.shape[-2]
        )
    assert documents.dropout.masks(0, documents.plan, 4, 2) is None


def test_packed_is_separate():
    lengths = (30, 3, 300, 17, 41)
    parts = [draw(10 + i, n) for i, n in enumerate(lengths)]
    step = DropoutStep(RATE, 7, 3)
    alone = [run(attention_of(tokens, segments_of(len(tokens)), step), qkv)[0] for tokens, qkv in parts]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        tokens, qkv = (np.concatenate([parts[i][side] for i in order]) for side in (0, 1))
        packed, _ = run(attention_of(tokens, segments_of(*(lengths[i] for i in order)), step), qkv)
        np.testing.assert_allclose(packed, np.concatenate([alone[i] for i in order]), atol=1e-5)


@pytest.mark.parametrize("change", ["seed", "step", "layer", "token", "head"])
def test_everything_that_should_changes_the_mask(change):
    tokens, _ = draw(3, 40)

    def mask(seed: int = 7, step: int = 3, layer: int = LAYER, token: int = 5, head: int = 0) -> np.ndarray:
        ids = tokens.copy()
        ids[20] = token
        documents = attention_of(ids, segments_of(40), DropoutStep(RATE, seed, step))
        found = documents.dropout.masks(layer, documents.plan, 4, 2).block(0, 0, 40).numpy() > 0
        return found.reshape(2, 40, 2, 40).transpose(0, 2, 1, 3).reshape(4, 40, 40)[head]

    other = {"seed": 8, "step": 4, "layer": 2, "token": 6, "head": 1}[change]
    same = (mask() == mask(**{change: other})).mean()
    drop, change_drop = RATE * 3 / 4, RATE * (2 if change == "layer" else 3) / 4
    agree = drop * change_drop + (1 - drop) * (1 - change_drop)
    assert abs(same - agree) < 0.07
    assert (mask() == mask()).all()


def test_ranks_with_some_of_the_heads_have_their_share_of_the_whole():
    tokens, qkv = draw(4, 50)
    segments, step = segments_of(20, 30), DropoutStep(RATE, 7, 3)
    whole, _ = run(attention_of(tokens, segments, step), qkv)
    z = qkv.reshape(50, HEADS.total, 4)
    half = HeadLayout(2, 1, 4)
    for rank in range(2):
        own = np.concatenate([z[:, 2 * rank : 2 * rank + 2], z[:, 4 + rank : 5 + rank], z[:, 6 + rank : 7 + rank]], 1)
        found, _ = run(attention_of(tokens, segments, step, heads=half, first_head=2 * rank), own.reshape(50, -1))
        np.testing.assert_allclose(found, whole[:, 8 * rank : 8 * rank + 8], atol=1e-6)


@pytest.mark.parametrize("keep", [1, 1024])
def test_long_documents_work_block_by_block(monkeypatch, keep):
    """A document of several blocks, with weights that are kept or computed again: its gradient along a direction."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(attention, "_KEEP_WEIGHTS", keep)
    tokens, qkv = draw(6, 50)
    step = DropoutStep(RATE, 7, 3)
    documents = attention_of(tokens, segments_of(50), step)
    found, gradient = run(documents, qkv)
    monkeypatch.setattr(attention, "_BLOCK", 256)
    np.testing.assert_allclose(found, run(attention_of(tokens, segments_of(50), step), qkv)[0], atol=1e-5)
    np.testing.assert_allclose(gradient, run(attention_of(tokens, segments_of(50), step), qkv)[1], atol=1e-5)


def test_branches_of_a_shared_prompt_drop_weights_of_the_prompt_independently():
    tokens, qkv = draw(7, 25)
    tokens[15:20], tokens[20:] = tokens[10:15], tokens[10:15]  # the same answer three times, once with no prompt
    qkv[15:20], qkv[20:] = qkv[10:15], qkv[10:15]
    segments, step = segments_of(10, 5, 5, 5), DropoutStep(RATE, 7, 3)
    found, _ = run(attention_of(tokens, segments, step, np.array([-1, 0, 0, -1])), qkv)
    np.testing.assert_array_equal(found[10:15], found[15:20])  # the same tokens behind the same prompt
    tokens[15] += 1
    other, _ = run(attention_of(tokens, segments, step, np.array([-1, 0, 0, -1])), qkv)
    np.testing.assert_array_equal(other[10:15], found[10:15])
    assert np.abs(other[15:20] - found[15:20]).max() > 0.01


def test_without_dropout_nothing_is_different():
    tokens, qkv = draw(8, 40)
    plain, zero = (
        attention_of(tokens, segments_of(40), None),
        attention_of(tokens, segments_of(40), DropoutStep(RATE, 7, 3)),
    )
    for a, b in zip(run(plain, qkv), run(zero, qkv, layer=0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_gpus_kernel_gets_a_seed_of_what_it_masks(monkeypatch: pytest.MonkeyPatch):
    """The same for the same tokens, layer, step and heads, whatever was drawn before; another where one of them is
    another: those of tensor ranks, stages and microbatches.
    """
    drawn = []

    def kernel(q, k, v, startend_row_indices, *, dropout, causal, fixed_seed_offset):
        assert causal and (dropout > 0) == (fixed_seed_offset is not None)
        if dropout:
            assert fixed_seed_offset.dtype == paddle.int64 and fixed_seed_offset.place.is_cpu_place()
            drawn.append((dropout, *fixed_seed_offset.tolist()))
        return q

    monkeypatch.setattr(paddle.nn.functional, "flashmask_attention", kernel)
    monkeypatch.setattr(fused, "flash_mask_applies", lambda *_: True)
    monkeypatch.setattr(fused, "rotate", lambda x, cos, sin: x)
    tokens, qkv = draw(0, 7)
    segments, step = segments_of(3, 4), DropoutStep(RATE, 5, 6)

    def ask(tokens=tokens, layer=LAYER, step=step, first_head=0, segments=segments) -> None:
        attention_of(tokens, segments, step, first_head=first_head).attend(paddle.to_tensor(qkv), layer)

    ask(layer=0)  # it drops nothing
    assert not drawn
    ask()
    ask()
    assert drawn[0] == drawn[1] and drawn[0][0] == RATE * LAYER / LAYERS and drawn[0][2] == 0
    ask(layer=LAYER - 1)
    ask(step=DropoutStep(RATE, 5, 7))
    ask(step=DropoutStep(RATE, 6, 6))
    ask(first_head=4)
    ask(tokens=tokens + 1)
    ask(tokens=np.concatenate([tokens[3:], tokens[:3]]), segments=segments_of(4, 3))
    seeds = [seed for _, seed, _ in drawn[1:]]
    assert len(set(seeds)) == len(seeds) == 7 and all(0 <= seed < 1 << 63 for seed in seeds)
