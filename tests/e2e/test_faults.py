"""Ranks that die or hang, hosts that vanish, schedulers that want the machine back: while a model really trains."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from support import fake_job, launched

import erniekit
from erniekit.checkpoint.safetensors_read import Reader

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
TWO = "data_parallel_degree=2"
LONG = "max_steps=100000"


def weights(path):
    reader = Reader(path)
    return {name: reader.read(name).tobytes() for name in reader.keys()}  # noqa: SIM118 no mapping


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(workspace, rank):
    """At the default time limit."""
    process = launched.start(workspace, TWO, LONG)
    launched.wait_for(workspace / "out" / "checkpoint-2", process)
    pids = launched.workers(process)
    began = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    code, said = launched.finish(process)
    seconds = time.monotonic() - began
    assert code == 1
    assert seconds < 30
    assert f"rank {rank} on " in said and "last finished step" in said
    assert said.rstrip().endswith(
        f"error: rank {rank} was killed by SIGKILL (the system does that when memory runs out)"
    )
    fake_job.assert_gone(pids.values())
    print(f"killed rank {rank}: the job ended after {seconds:.1f} s")


LOOPS_AT_SIGUSR1 = """
import signal
def endless(number, frame):
    while True:
        pass
signal.signal(signal.SIGUSR1, endless)
"""


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGSTOP, "it is stopped (SIGSTOP"), (signal.SIGUSR1, "in endless for")],
    ids=["stopped", "looping"],
)
def test_a_rank_that_hangs_ends_the_job_within_the_default_limit(workspace, number, why):
    (workspace / "sitecustomize.py").write_text(LOOPS_AT_SIGUSR1)
    # No saves: a rank that hangs in one is given watch.PATIENCE times as long.
    process = launched.start(workspace, TWO, LONG, "save_strategy=no", PYTHONPATH=f"{workspace}:{ROOT}")
    launched.wait_for(workspace / "out" / "metrics.jsonl", process)
    while len(launched.steps_of(workspace / "out")) < 2:
        time.sleep(0.05)
    pids = launched.workers(process)
    began = time.monotonic()
    os.kill(pids[1], number)
    code, said = launched.finish(process)
    seconds = time.monotonic() - began
    assert code == 1
    assert seconds < 30
    assert "rank 1 on " in said and "hangs: " in said and why in said, said
    fake_job.assert_gone(pids.values())
    print(f"{number.name}: the job ended after {seconds:.1f} s")


def test_a_killed_rank_and_a_restart_lose_nothing(workspace):
    words = ("max_steps=12", f"model_name_or_path={workspace}/moe", "gradient_accumulation_steps=2")
    process = launched.start(workspace, TWO, *words, "max_restarts=1", "overwrite_output_dir=true")
    launched.wait_for(workspace / "out" / "checkpoint-4", process)
    os.kill(launched.workers(process)[1], signal.SIGKILL)
    code, said = launched.finish(process)
    assert code == 0, said
    assert "Starting again: attempt 2 of 2" in said and "resuming after step" in said
    whole = launched.start(workspace, TWO, *words, f"output_dir={workspace}/whole")
    assert launched.finish(whole)[0] == 0
    assert weights(workspace / "out") == weights(workspace / "whole")


@pytest.mark.parametrize(("degree", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_schedulers_signal_saves_and_the_same_command_goes_on(workspace, degree, number):
    """As schedulers do it: to every process of the group at once, data workers included."""
    words = ("max_steps=60", "save_steps=1000", f"data_parallel_degree={degree}", "dataloader_num_workers=1")
    process = launched.start(workspace, *words)
    launched.wait_for(workspace / "out" / "metrics.jsonl", process)
    for group in (process.pid, *launched.workers(process).values()):
        os.killpg(group, number)
    code, said = launched.finish(process)
    assert code == 0, said
    assert f"stopped by {number.name} after step" in said
    assert len(list((workspace / "out").glob("checkpoint-*"))) == 1
    assert not (workspace / "out" / "model.safetensors").exists()
    again = launched.start(workspace, *words)
    code, said = launched.finish(again)
    assert code == 0, said
    assert "resuming after step" in said
    steps = launched.steps_of(workspace / "out")
    assert [record["step"] for record in steps] == list(range(1, 61))


def test_an_elastic_job_goes_on_without_a_host(workspace):
    """The second of two hosts is lost; the first one trains on alone, over the same global batches."""
    port = launched.free_port()
    words = ("max_steps=14", TWO, "max_restarts=1", "elastic=true", "distributed_timeout=5")
    hosts = [launched.start(workspace, *words, **launched.two_hosts(port, node)) for node in range(2)]
    launched.wait_for(workspace / "out" / "checkpoint-4", hosts[0])
    lost = launched.workers(hosts[1])
    hosts[1].kill()
    hosts[1].communicate()
    code, said = launched.finish(hosts[0])
    assert code == 0, said
    assert "lost with its host" in said
    assert "1 data rank instead of 2, gradient_accumulation_steps 2 instead of 1: still 4 rows a step" in said
    fake_job.assert_gone(lost.values())
    whole = erniekit.train(
        str(workspace / "run.yaml"), output_dir=str(workspace / "one"), gradient_accumulation_steps=2, max_steps=14
    )
    losses = [record["loss"] for record in launched.steps_of(workspace / "out")]
    np.testing.assert_allclose(losses, [record["loss"] for record in whole.history], rtol=1e-5)


def can_make_networks() -> bool:
    """Network namespaces need root and iproute2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"erniekit-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], check=False).returncode == 0


@pytest.fixture
def networks():
    """Two network namespaces with a cable between them: 10.99.0.1 and 10.99.0.2."""
    if not can_make_networks():
        pytest.skip("network namespaces are not allowed here")
    number = os.getpid()
    names = [f"erniekit-{letter}-{number}" for letter in "ab"]
    cables = [f"ek{letter}{number}" for letter in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for place, (name, cable) in enumerate(zip(names, cables), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.99.0.{place}/24", "dev", cable)
            for each in ("lo", cable):
                ip("-n", name, "link", "set", each, "up")
        yield names, lambda: ip("-n", names[1], "link", "set", cables[1], "down")
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_hosts_and_a_cut_cable(workspace, networks):
    """Nothing tells a host that packets no longer arrive: both notice by themselves, and end."""
    names, cut = networks
    environ = {
        "NNODES": "2",
        "MASTER_ADDR": "10.99.0.1",
        "MASTER_PORT": "8080",
        "ERNIEKIT_JOB_TOKEN": "0123456789abcdef",
    }
    words = (TWO, LONG, "distributed_timeout=8")
    hosts = [launched.start(workspace, *words, network=name, **environ) for name in names]
    launched.wait_for(workspace / "out" / "checkpoint-2", hosts[0])
    began = time.monotonic()
    cut()
    ends = [launched.finish(host) for host in hosts]
    seconds = time.monotonic() - began
    assert [code for code, _ in ends] == [1, 1]
    assert "rank 1 on " in ends[0][1] and "(10.99.0.2) is lost with its host" in ends[0][1]
    assert "the first host cannot be reached" in ends[1][1]
    assert seconds < 20
    print(f"cut cable, distributed_timeout 8: both hosts ended after {seconds:.1f} s")
