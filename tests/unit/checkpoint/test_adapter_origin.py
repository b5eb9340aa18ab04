"""An adapter that is used on another model than it was trained on."""

import logging

import pytest

from erniekit.checkpoint.adapter_origin import say_if_base_differs
from erniekit.config import Config

TRAINED = "rope_theta: null\nrope_scaling: linear\nmax_seq_len: 512\nmoe_group_experts: false\n"


@pytest.mark.parametrize(
    ("trained", "used", "said"),
    [
        (TRAINED, {"rope_scaling": "linear", "max_seq_len": 512}, None),
        (TRAINED, {}, "rope_scaling: linear, max_seq_len: 512"),
        (TRAINED, {"rope_scaling": "linear", "max_seq_len": 256}, "rope_scaling: linear, max_seq_len: 512"),
        (TRAINED, {"rope_scaling": "yarn", "max_seq_len": 512}, "rope_scaling: linear, max_seq_len: 512"),
        ("rope_scaling: ''\nmax_seq_len: 512\n", {"max_seq_len": 64}, None),
        ("{}", {"rope_theta": 7.0}, "rope_theta: not given"),
        ("moe_group_experts: true", {}, "moe_group_experts: True"),
        ("- no mapping", {"rope_theta": 7.0}, None),
        (None, {"rope_theta": 7.0}, None),
    ],
)
def test_what_was_changed_in_the_base_is_said_where_it_differs(tmp_path, caplog, monkeypatch, trained, used, said):
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    if trained is not None:
        (tmp_path / "config.yaml").write_text(trained)
    say_if_base_differs(tmp_path, Config(**used))
    lines = {line.partition("config.yaml: ")[2].partition(". Set")[0] for line in caplog.messages}
    assert lines == (
        set() if said is None else {f"this adapter was trained with {said}: its base is another model now"}
    )
