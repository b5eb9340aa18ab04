"""Rebuild tests/parity/fixtures/preference_trl.json: what TRL's own code computes for the preference losses.

    python tools/make_preference_fixture.py

DPOTrainer has its losses inside one long method; it is called here with a stand-in for the trainer and for the model,
which gives log-probabilities drawn at random. CPOTrainer (SimPO, smoothed labels) and ORPOTrainer have methods of their
own. Needs the extra `parity`.
"""

import json
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

OUT = Path(__file__).resolve().parents[1] / "tests" / "parity" / "fixtures" / "preference_trl.json"
# case -> (who computes it, the loss's name there, keyword arguments of erniekit.losses.preference_loss)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sigmoid": ("dpo", "sigmoid", {"loss_type": "sigmoid"}),
    "hinge": ("dpo", "hinge", {"loss_type": "hinge"}),
    "ipo": ("dpo", "ipo", {"loss_type": "ipo"}),
    "exo_pair": ("dpo", "exo_pair", {"loss_type": "exo_pair", "label_smoothing": 0.1}),
    "nca_pair": ("dpo", "nca_pair", {"loss_type": "nca_pair"}),
    "robust": ("dpo", "robust", {"loss_type": "robust", "label_smoothing": 0.2}),
    "sppo_hard": ("dpo", "sppo_hard", {"loss_type": "sppo_hard"}),
    "apo_zero": ("dpo", "apo_zero", {"loss_type": "apo_zero"}),
    "apo_down": ("dpo", "apo_down", {"loss_type": "apo_down"}),
    "simpo": ("cpo", "simpo", {"loss_type": "simpo", "simpo_gamma": 0.7}),
    "smoothed": ("cpo", "sigmoid", {"loss_type": "sigmoid", "label_smoothing": 0.1, "reference_free": True}),
    "or": ("orpo", "or", {"loss_type": "or", "beta": 1.0}),
}
BETA = 0.25


def draw(seed: int, num_pairs: int = 6) -> dict[str, list[Any]]:
    """Lengths of the answers and per-token log-probabilities: {"policy_chosen": [[...], ...], ...}."""
    random = np.random.default_rng(seed)
    lengths = {side: random.integers(1, 9, num_pairs) for side in ("chosen", "rejected")}
    drawn: dict[str, list[Any]] = {}
    for side, counts in lengths.items():
        policy = [-random.gamma(1.0, 1.5, n) - 1e-3 for n in counts]
        drawn[f"policy_{side}"] = [p.tolist() for p in policy]
        drawn[f"ref_{side}"] = [(p + random.normal(0, 1.0, len(p))).clip(max=-1e-3).tolist() for p in policy]
    return drawn


def _dpo_pair(name: str, pair: dict[str, list[float]], options: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """(loss, metrics) of one pair by DPOTrainer; answers stand behind a prompt of one token."""
    width = max(len(pair["policy_chosen"]), len(pair["policy_rejected"]))
    rows = {who: torch.zeros(2, width, dtype=torch.float64) for who in ("policy", "ref")}
    mask = torch.zeros(2, width + 1, dtype=torch.long)
    for row, side in enumerate(("chosen", "rejected")):
        n = len(pair[f"policy_{side}"])
        mask[row, 1 : 1 + n] = 1
        for who in rows:
            rows[who][row, :n] = torch.as_tensor(pair[f"{who}_{side}"])

    def outputs(log_probs: torch.Tensor) -> Any:
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        use_weighting=False,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        label_smoothing=options.get("label_smoothing", 0.0),
        beta=options.get("beta", BETA),
        ld_alpha=None,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": rows["ref"][:1].sum(1),
        "ref_rejected_logps": rows["ref"][1:].sum(1),
    }
    policy = rows["policy"].requires_grad_()
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs(policy), inputs, False)
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss, gradient[:, 0]


def _own_method(who: str, name: str, pair: dict[str, list[float]], options: dict[str, Any]) -> tuple[Any, Any]:
    """(loss, gradients of the two sums) of one pair by CPOTrainer or ORPOTrainer."""
    sums = torch.tensor([sum(pair["policy_chosen"]), sum(pair["policy_rejected"])]).requires_grad_()
    averaged = name in ("simpo", "or")
    lengths = torch.tensor([len(pair["policy_chosen"]), len(pair["policy_rejected"])])
    logps = sums / lengths if averaged else sums
    trainer = SimpleNamespace(
        beta=options.get("beta", BETA),
        alpha=0.0,
        loss_type=name,
        simpo_gamma=options.get("simpo_gamma", 0.0),
        label_smoothing=options.get("label_smoothing", 0.0),
        accelerator=SimpleNamespace(device="cpu"),
    )
    if who == "orpo":
        loss = -ORPOTrainer.odds_ratio_loss(trainer, logps[:1], logps[1:])[0].mean()
    else:
        loss = CPOTrainer.cpo_loss(trainer, logps[:1], logps[1:])[0].mean()
    (gradient,) = torch.autograd.grad(loss, sums)
    return loss, gradient


def reference(case: str, drawn: dict[str, list[Any]]) -> dict[str, list[float]]:
    """TRL's loss of each pair, and its gradient by the summed log-probabilities of chosen and rejected."""
    who, name, options = CASES[case]
    result: dict[str, list[float]] = {"loss": [], "d_chosen": [], "d_rejected": []}
    for i in range(len(drawn["policy_chosen"])):
        pair = {key: values[i] for key, values in drawn.items()}
        loss, gradient = _dpo_pair(name, pair, options) if who == "dpo" else _own_method(who, name, pair, options)
        result["loss"].append(loss.item())
        result["d_chosen"].append(gradient[0].item())
        result["d_rejected"].append(gradient[1].item())
    return result


def main() -> None:
    """Write the fixture."""
    drawn = draw(0)
    cases = {case: {"options": {"beta": BETA} | CASES[case][2], **reference(case, drawn)} for case in CASES}
    OUT.write_text(json.dumps({"drawn": drawn, "cases": cases}, indent=1) + "\n")
    print(f"{OUT}: {len(cases)} cases")


if __name__ == "__main__":
    main()
