"""What context parallelism is refused with, by the names of the keys."""

from typing import Any

import pytest

from erniekit.config import load
from erniekit.config.methods import METHODS
from erniekit.utils.errors import ConfigError

BASE: dict[str, Any] = {
    "model_name_or_path": "m",
    "output_dir": "o",
    "train_dataset_path": "d",
    "train_dataset_type": "erniekit",
    "context_parallel_degree": 2,
}
ABLE = ["SFT", "PT", "DPO", "RM", "VL-SFT", "VL-PT", "VL-DPO", "KTO"]


def test_the_methods_whose_rows_are_divided():
    assert [name for name, facts in METHODS.items() if facts.divides_rows] == ABLE
    assert load(None, BASE | {"stage": "SFT"}, "train").context_parallel_degree == 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"stage": "RL"}, "context_parallel_degree: 2: not built for stage: RL; it is for SFT, PT,"),
        ({"moe_capacity_factor": 1.5}, "not with moe_capacity_factor: 1.5"),
        (
            {"attention_probs_dropout_prob": 0.1},
            "does not support attention_probs_dropout_prob: 0.1. Set cp_comm_type: a2a",
        ),
        ({"compute_type": "bf16", "emulate_precision": True}, "computes in fp32, and emulate_precision"),
        ({"qat": "w8a8", "qat_distill_weight": 0.5}, "not built with qat_distill_weight: 0.5"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], expected: str):
    with pytest.raises(ConfigError) as caught:
        load(None, BASE | keys, "train")
    assert expected in str(caught.value)


def test_exchanged_heads_have_what_the_ring_lacks():
    keys = BASE | {"cp_comm_type": "a2a", "attention_probs_dropout_prob": 0.1}
    assert load(None, keys | {"compute_type": "bf16", "emulate_precision": True}, "train").cp_comm_type == "a2a"
