"""Losses against TRL's own code: those of pairs on other numbers than the committed ones, those of judged answers, and
the divergence from a teacher. Skipped where it is absent.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from parity.support import load_tool

from erniekit.losses import preference_loss
from erniekit.losses.distillation import Divergence, linear_divergence
from erniekit.losses.kto import kto_loss
from erniekit.losses.lm import Head

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


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_judged_answers_agree_with_trl(loss_type):
    """KTOTrainer._compute_loss on a bare trainer, whose model returns drawn log-probabilities."""
    import torch
    from trl import KTOTrainer

    rng, good = np.random.default_rng(5), np.array([True, False, True, True, False, False])
    drawn = {name: rng.normal(-2, 0.6, (6, 4)) for name in ("policy", "kl", "ref", "ref_kl")}
    policy = torch.tensor(drawn["policy"], requires_grad=True)

    def model(input_ids, **others):
        of_answers = input_ids.shape[1] == 5
        log_probs = policy if of_answers else torch.tensor(drawn["kl"])
        return SimpleNamespace(log_probs=log_probs, entropy=torch.zeros(6, 4), mean_logits=torch.zeros(6, 4))

    model.training = True
    trainer = object.__new__(KTOTrainer)
    identity = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    vars(trainer).update(
        model=model, accelerator=identity, aux_loss_enabled=False, precompute_ref_logps=True, loss_type=loss_type,
        calculate_KL=loss_type == "kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.8, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    masks = {f"{kl}{name}": torch.ones(6, 5 + bool(kl), dtype=torch.long)
             for kl in ("", "KL_") for name in ("input_ids", "attention_mask", "completion_mask")}  # fmt: skip
    sums = {"ref_logps": drawn["ref"].sum(1), "ref_KL_logps": drawn["ref_kl"].sum(1)}
    expected = trainer._compute_loss(
        model, masks | {"label": torch.tensor(good)} | {k: torch.tensor(v) for k, v in sums.items()}, False
    )
    expected.backward()

    ours = paddle.to_tensor(drawn["policy"].astype(np.float32), stop_gradient=False)
    kl = max(float((drawn["kl"].sum(1) - drawn["ref_kl"].sum(1)).mean()), 0.0)
    reference = paddle.to_tensor(sums["ref_logps"].astype(np.float32))
    options = {"loss_type": loss_type, "beta": 0.2, "good_weight": 1.3, "bad_weight": 0.8}
    loss = kto_loss(ours.sum(1) - reference, paddle.to_tensor(good), kl, **options).mean()
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # fp32
    np.testing.assert_allclose(ours.grad.numpy(), policy.grad.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_divergence_from_a_teacher_agrees_with_trl(beta):
    import torch
    from trl.experimental.gkd import GKDTrainer

    own, teacher = np.random.default_rng(6).normal(0, 2, (2, 1, 5, 9))
    student = torch.tensor(own, requires_grad=True)
    labels = torch.tensor([[-100, 1, 2, -100, 3]])
    expected = GKDTrainer.generalized_jsd_loss(student, torch.tensor(teacher), labels, beta, 0.9)
    expected.backward()
    hidden = paddle.to_tensor(own[0].astype(np.float32), stop_gradient=False)
    weights = paddle.to_tensor((labels[0].numpy() != -100).astype(np.float32))
    head, states = Head(paddle.eye(9), True), paddle.to_tensor(teacher[0].astype(np.float32))
    loss = linear_divergence(hidden, head, states, head, weights, 2, Divergence(beta, 0.9)) / 3
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # fp32
    np.testing.assert_allclose(hidden.grad.numpy(), student.grad.numpy()[0], atol=1e-6)
