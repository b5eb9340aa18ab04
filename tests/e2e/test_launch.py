"""One command trains in several processes, on one host or on several, what one process would have trained."""

import time

import numpy as np
import pytest
from support import launched
from support.vision_directories import vision_workspace

import erniekit

# fp32 sums in another order: 1e-5 is some tens of units in the last place of a loss near 5.
TOLERANCE = 1e-5


def assert_same_losses(left, right):
    losses = [[record["loss"] for record in launched.steps_of(path)] for path in (left, right)]
    np.testing.assert_allclose(*losses, rtol=TOLERANCE)


def test_two_processes_train_what_one_does(workspace):
    words = (f"model_name_or_path={workspace}/moe", "max_steps=4", "batch_size=1", "moe_aux_loss_lambda=0.01")
    process = launched.start(workspace, *words, "data_parallel_degree=2", "expert_parallel_degree=2")
    code, said = launched.finish(process)
    assert code == 0, said
    assert "ranks 0 to 1 of 2" in said and "step 4/4" in said
    assert said.count("step 1/4") == 1, "only rank 0 streams"
    assert "[erniekit 1]" in (workspace / "out" / "logs" / "rank-1.log").read_text()
    keys = dict(word.split("=") for word in words)
    erniekit.train(
        str(workspace / "run.yaml"), output_dir=str(workspace / "one"), gradient_accumulation_steps=2, **keys
    )
    assert_same_losses(workspace / "out", workspace / "one")


@pytest.mark.slow
def test_two_hosts_train_what_one_does(workspace):
    """The same command twice, with a host's variables each; the loopback interface is the network."""
    port = launched.free_port()
    words = ("max_steps=4", "data_parallel_degree=2", "pipeline_parallel_degree=2")
    hosts = [launched.start(workspace, *words, **launched.two_hosts(port, node)) for node in range(2)]
    ends = [launched.finish(host) for host in hosts]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "ranks 0 to 1 of 4" in ends[0][1] and "step 4/4" in ends[0][1]
    assert "ranks 2 to 3 of 4" in ends[1][1] and "step 4/4" not in ends[1][1]
    erniekit.train(
        str(workspace / "run.yaml"), output_dir=str(workspace / "one"), gradient_accumulation_steps=2, max_steps=4
    )
    assert_same_losses(workspace / "out", workspace / "one")


@pytest.mark.slow
def test_two_hosts_train_on_pictures_what_one_does(tmp_path):
    """Tokens go to experts, pixels to the rank that encodes them and features back, all between the two hosts."""
    vision_workspace(tmp_path)
    port = launched.free_port()
    hosts = [
        launched.start(tmp_path, "expert_parallel_degree=2", **launched.two_hosts(port, node)) for node in range(2)
    ]
    ends = [launched.finish(host) for host in hosts]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "without balance_pictures it would be" in ends[0][1] and "step 6/6" in ends[0][1]
    steps = launched.steps_of(tmp_path / "out")
    assert any(step["patch_load_max_over_mean"] < step["patch_load_max_over_mean_unbalanced"] for step in steps)
    erniekit.train(str(tmp_path / "run.yaml"), output_dir=str(tmp_path / "one"), gradient_accumulation_steps=4)
    assert_same_losses(tmp_path / "out", tmp_path / "one")


def test_degrees_that_do_not_fit_are_refused_at_once(workspace):
    code, said = launched.finish(launched.start(workspace, "tensor_parallel_degree=2"))
    assert code == 1
    assert "tensor_parallel_degree: 2 does not divide" in said and "1 / 2 = 0.50" in said
    assert not (workspace / "out").exists()


def test_a_mistake_that_only_the_workers_find_is_said_once(workspace):
    (workspace / "train.jsonl").write_text('{"src": ["a"], "tgt": ["b"]}\nnot json\n')
    began = time.monotonic()
    code, said = launched.finish(launched.start(workspace, "data_parallel_degree=2", "max_restarts=3"))
    assert code == 1
    assert said.count("error: ") == 1 and "train.jsonl:2" in said[said.index("error: ") :]
    assert "Traceback" not in said
    assert "Starting again" not in said and time.monotonic() - began < 120
