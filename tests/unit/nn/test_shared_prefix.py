"""Documents that branch from a shared prefix: equal to the same documents written out one by one."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.models.inputs import packed_inputs
from erniekit.nn import attention
from erniekit.nn.attention import HeadLayout, PackedAttention, last_rows
from erniekit.nn.attention_mask import AttentionPlan, make_plan
from erniekit.nn.rotary import Rotary

HEADS = HeadLayout(4, 2, 4)
# Each: (prefix, [branches]); a prefix without branches is a plain document.
Family = tuple[int, list[int]]
CASES: dict[str, list[Family]] = {
    "one pair": [(5, [3, 4])],
    "packed": [(5, [3, 4]), (7, []), (2, [6, 1]), (6, [3, 3])],
    "one branch and three": [(4, [2]), (3, [1, 2, 3]), (1, [])],
    "unequal prefixes in a bucket": [(9, [8, 8]), (14, [8, 7]), (16, [6, 8])],
    "longer than a block": [(300, [270, 40]), (40, [300, 290])],
}


def plan_of(families: list[Family]) -> tuple[np.ndarray, np.ndarray, AttentionPlan]:
    """(segment ids [1, T], prefixes [documents], the plan)."""
    lengths: list[int] = []
    prefixes: list[int] = []
    for prefix, branches in families:
        first = len(lengths)
        lengths += [prefix, *branches]
        prefixes += [-1, *[first] * len(branches)]
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    return segments, np.array(prefixes), make_plan(segments, np.array(prefixes))


def written_out(families: list[Family]) -> tuple[list[np.ndarray], list[int]]:
    """Token numbers of every branch with its prefix before it (of the document, if it has none), and how many of them
    belong to the prefix.
    """
    tokens, widths, begin = [], [], 0
    for prefix, branches in families:
        shared, at = np.arange(begin, begin + prefix), begin + prefix
        for branch in branches:
            tokens.append(np.concatenate([shared, np.arange(at, at + branch)]))
            widths.append(prefix)
            at += branch
        if not branches:
            tokens.append(shared)
            widths.append(0)
        begin = at
    return tokens, widths


def attend(qkv: np.ndarray, plan: AttentionPlan, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = paddle.to_tensor(qkv.astype(np.float32), stop_gradient=False)
    rotation = Rotary(4, 10000.0).at(plan.position_in_document, 6, 2)
    y = PackedAttention(plan, rotation, HEADS).attend(x, 0)
    (y * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    return y.numpy(), x.grad.numpy()


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_branches_equal_documents_that_repeat_their_prefix(case, keep_weights, monkeypatch):
    if not keep_weights:
        monkeypatch.setattr(attention, "_KEEP_WEIGHTS", 0)
    families = CASES[case]
    segments, _, plan = plan_of(families)
    random = np.random.default_rng(0)
    qkv = random.normal(size=(segments.size, HEADS.total * HEADS.dim))
    upstream = random.normal(size=(segments.size, HEADS.num_heads * HEADS.dim))
    context, gradient = attend(qkv, plan, upstream)
    expected = np.zeros_like(gradient, dtype=np.float64)
    seen = np.zeros(segments.size, dtype=bool)
    for tokens, _ in zip(*written_out(families), strict=True):
        own = upstream[tokens] * ~seen[tokens][:, None]  # the prefix's own output counts once
        alone, alone_gradient = attend(qkv[tokens], make_plan(np.ones((1, len(tokens)), int)), own)
        np.testing.assert_allclose(context[tokens], alone, rtol=1e-4, atol=1e-5)
        np.add.at(expected, tokens, alone_gradient)
        seen[tokens] = True
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_positions_continue_the_prefix_and_keys_end_with_their_last_reader():
    _, _, plan = plan_of([(3, [2, 2]), (2, [])])
    assert plan.position_in_document.tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 1]
    # What the FlashMask path is given: the prefix is seen until the last branch ends, a branch until it ends itself.
    assert last_rows(plan).tolist() == [7, 7, 7, 5, 5, 7, 7, 9, 9]


def test_a_branch_does_not_see_the_branch_before_it():
    _, _, plan = plan_of([(3, [4, 4])])
    qkv = np.random.default_rng(1).normal(size=(11, HEADS.total * HEADS.dim))
    ones = np.ones((11, HEADS.num_heads * HEADS.dim))
    before, _ = attend(qkv, plan, ones)
    qkv[3:7] += 5.0
    after, _ = attend(qkv, plan, ones)
    np.testing.assert_array_equal(before[7:], after[7:])
    np.testing.assert_array_equal(before[:3], after[:3])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_model_gives_the_logits_and_gradients_of_separate_rows(kind):
    """One row of prompt, chosen, rejected against two rows: logits to 1e-5, gradients to 1e-5 of the largest."""
    families = [(6, [3, 5]), (4, [2, 2])]
    segments, prefixes, _ = plan_of(families)
    random = np.random.default_rng(2)
    ids = random.integers(0, 61, segments.size)
    upstream = random.normal(size=(segments.size, 61)).astype(np.float32)
    tokens, widths = written_out(families)
    answers = np.concatenate([t[w:] for t, w in zip(tokens, widths, strict=True)])

    model = tiny_model(kind)
    hidden = model.model(packed_inputs(model, ids, segments, prefixes=prefixes))
    logits = model.head(hidden.normed)
    paddle.sum(paddle.gather(logits * paddle.to_tensor(upstream), paddle.to_tensor(answers))).backward()
    together = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    model.clear_gradients()
    for t, w in zip(tokens, widths, strict=True):
        alone = model(ids[t][None])[0]
        np.testing.assert_allclose(logits.numpy()[t], alone.numpy(), rtol=1e-5, atol=1e-5)
        (alone[w:] * paddle.to_tensor(upstream[t[w:]])).sum().backward()
    separate = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert together.keys() == separate.keys()
    for name, gradient in separate.items():
        np.testing.assert_allclose(together[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
