"""Faults of real processes that only pretend to train: who is named, what is printed last, and that nobody is left."""

import contextlib
import json
import os
import re
import signal
import socket
import time

import pytest
from support import fake_job, launched


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_job_that_ends_well(tmp_path):
    code, said = fake_job.finish(fake_job.start(tmp_path, steps=3))
    assert code == 0, said
    assert "ranks 0 to 1 of 2" in said
    assert "words [] from step 0" in said, "rank 0 streams to the terminal"
    assert "words [] from step 0" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert said.count("words") == 1


def test_the_first_error_comes_last(tmp_path):
    """Rank 1 fails; rank 0 fails because of it, and even reports first."""
    process = fake_job.start(tmp_path, world=3, acts={"0": ["peer", 5], "1": ["raise", 6], "2": ["wait", 5]})
    code, said = fake_job.finish(process)
    assert code == 70
    assert said.rstrip().endswith("error: the disk is on fire")
    assert "closed by peer" not in said
    assert "rank 1 on " in said and "last finished step: 5" in said and socket.gethostname() in said
    assert_nobody_left(tmp_path)


def assert_nobody_left(directory):
    fake_job.assert_gone(fake_job.pids(directory, 1).values())


def test_a_killed_rank(tmp_path):
    process = fake_job.start(tmp_path, acts={"0": ["wait", 4], "1": ["die", 4]})
    code, said = fake_job.finish(process)
    assert code == 1
    assert "last words\nerror: rank 1 was killed by SIGKILL" in said
    assert "last finished step: 3" in said and "rank-1.log" in said
    assert_nobody_left(tmp_path)


@pytest.mark.parametrize(("act", "why"), [("freeze", "SIGSTOP"), ("loop", "_act")])
def test_a_rank_that_hangs(tmp_path, act, why):
    process = fake_job.start(tmp_path, acts={"0": ["wait", 4], "1": [act, 4]})
    fake_job.pids(tmp_path, 2)
    began = time.monotonic()
    code, said = fake_job.finish(process)
    assert code == 1
    assert time.monotonic() - began < 20, "limits.fault is 4 s"
    assert "rank 1 on" in said and "hangs" in said and why in said and "distributed_timeout (now 4)" in said
    assert_nobody_left(tmp_path)


def test_a_restart_goes_on_from_what_was_saved(tmp_path):
    process = fake_job.start(tmp_path, steps=12, acts={"0": ["wait", 9], "1": ["die", 6]}, max_restarts=1)
    code, said = fake_job.finish(process)
    assert code == 0, said
    assert "Starting again: attempt 2 of 2" in said and "rank 1 was killed" in said
    assert "words ['again'] from step 8" in said
    assert "last words" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert (tmp_path / "logs" / "rank-1.attempt-2.log").exists()


def test_restarts_are_counted(tmp_path):
    process = fake_job.start(tmp_path, acts={"0": ["always wait", 9], "1": ["always die", 12]}, max_restarts=2)
    code, said = fake_job.finish(process)
    assert code == 1
    assert said.count("Starting again") == 2


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path):
    process = fake_job.start(tmp_path, acts={"1": ["user error", 4]}, max_restarts=2)
    code, said = fake_job.finish(process)
    assert code == 1
    assert "the same error would occur again" in said and "Starting again" not in said
    assert said.rstrip().endswith("error: train_dataset_path: no such file")


def test_sigterm_lets_the_workers_end_their_step(tmp_path):
    process = fake_job.start(tmp_path, steps=2000)
    fake_job.pids(tmp_path, 2)
    process.terminate()
    code, said = fake_job.finish(process)
    assert code == 0, said
    assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_other_signals_end_a_step_too(tmp_path, number):
    process = fake_job.start(tmp_path, steps=2000)
    workers = fake_job.pids(tmp_path, 2)
    process.send_signal(number)
    code, said = fake_job.finish(process)
    assert code == (130 if number == signal.SIGINT else 0), said
    assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()
    fake_job.assert_gone(workers.values())


def test_a_signal_before_training(tmp_path):
    """The workers have not begun to listen; it waits for them."""
    process = fake_job.start(tmp_path, steps=2000, starting=1.0)
    while "ranks 0 to 1" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    code, said = fake_job.finish(process)
    assert code == 143 and "stopped by SIGTERM" in said and "Traceback" not in said, said
    assert not list(tmp_path.glob("pid-*"))


def hanging(directory, world=3):
    """A job whose ranks 1 and 2 are stuck in their fifth step."""
    process = fake_job.start(directory, world=world, steps=2000, acts={"1": ["loop", 5], "2": ["wait", 5]}, fault=60.0)
    workers = fake_job.pids(directory, world)
    while not all((directory / f"acts-{rank}").exists() for rank in (1, 2)):
        time.sleep(0.02)
    return process, workers


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process, workers = hanging(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, said = fake_job.finish(process, timeout=10)
    assert code == 130 and "Traceback" not in said
    fake_job.assert_gone(workers.values())


def test_no_worker_outlives_its_agent(tmp_path):
    process, workers = hanging(tmp_path)
    process.kill()
    assert fake_job.finish(process)[0] == -signal.SIGKILL
    fake_job.assert_gone(workers.values())


def test_a_worker_that_still_starts_dies_with_its_agent(tmp_path):
    process = fake_job.start(tmp_path, steps=2000, starting=1.0)
    while "ranks 0 to 1" not in process.stderr.readline():
        pass
    time.sleep(0.2)
    workers = list(launched.workers(process).values())
    process.kill()
    process.communicate()
    assert len(workers) == 2
    fake_job.assert_gone(workers)


# ---- two "hosts" on the loopback interface


def test_two_hosts(tmp_path):
    port = free_port()
    jobs = [fake_job.start(tmp_path, world=4, hosts=2, port=port, steps=5) for _ in range(2)]
    ends = [fake_job.finish(job) for job in jobs]
    assert [code for code, _ in ends] == [0, 0], ends
    lines = sorted(said[said.index("host ") :].split(";")[0] for _, said in ends)
    name = socket.gethostname()
    assert lines == [f"host 1 of 2 ({name}): ranks 0 to 1 of 4", f"host 2 of 2 ({name}): ranks 2 to 3 of 4"]
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"rank-{rank}.log" for rank in (1, 2, 3)}


def test_a_fault_on_one_host_ends_both_and_is_told_on_both(tmp_path):
    port = free_port()
    acts = {"0": ["wait", 9], "1": ["peer", 7], "2": ["wait", 9], "3": ["raise", 6]}
    jobs = [fake_job.start(tmp_path, world=4, hosts=2, port=port, node=n, acts=acts) for n in range(2)]
    for code, said in [fake_job.finish(job) for job in jobs]:
        assert code == 70, said
        assert "rank 3 on" in said and said.rstrip().endswith("the disk is on fire")
    assert_nobody_left(tmp_path)


@pytest.mark.slow
def test_a_lost_host_and_elastic(tmp_path):
    """The second agent is killed: its workers go with it, and the first host goes on alone."""
    port = free_port()
    keys = {"max_restarts": 1, "elastic": True, "fault": 5.0}
    jobs = [fake_job.start(tmp_path, hosts=2, port=port, node=n, steps=100, **keys) for n in range(2)]
    workers = fake_job.pids(tmp_path, 2)
    jobs[1].kill()
    fake_job.finish(jobs[1])
    code, said = fake_job.finish(jobs[0])
    assert code == 0, said
    # Three seconds without the connection, or as long without a report: whichever is noticed first.
    assert "rank 1 on" in said and re.search(r"lost with its host \(rank 1\): (the connection|its agent)", said), said
    assert "goes on with 1" in said and "words ['shrunk=1', 'again']" in said
    fake_job.assert_gone(workers.values())


@pytest.mark.slow
def test_a_host_that_comes_back_is_taken_again(tmp_path):
    port = free_port()
    keys = {"hosts": 2, "port": port, "steps": 100, "max_restarts": 1}
    jobs = [fake_job.start(tmp_path, node=n, **keys) for n in range(2)]
    fake_job.pids(tmp_path, 2)
    jobs[1].kill()
    fake_job.finish(jobs[1])
    back = fake_job.start(tmp_path, node=1, **keys)
    for job in (jobs[0], back):
        code, said = fake_job.finish(job)
        assert code == 0, said
        assert "2 of 2" in said


@pytest.mark.slow
def test_the_master_is_lost(tmp_path):
    port = free_port()
    jobs = [fake_job.start(tmp_path, hosts=2, port=port, node=n, steps=2000) for n in range(2)]
    workers = fake_job.pids(tmp_path, 2)
    jobs[0].kill()
    fake_job.finish(jobs[0])
    code, said = fake_job.finish(jobs[1])
    assert code == 1
    assert f"127.0.0.1:{port}" in said and "Traceback" not in said
    fake_job.assert_gone(workers.values())


def test_a_host_that_never_comes(tmp_path):
    job = fake_job.start(tmp_path, hosts=2, port=free_port(), rendezvous=2.0)
    code, said = fake_job.finish(job)
    assert code == 1
    assert "error: hosts that have come: 1 of 2 (" in said and socket.gethostname() in said and "after 2 s" in said
    assert "rendezvous_timeout" in said


def test_a_host_with_another_configuration_is_sent_away(tmp_path):
    port = free_port()
    first = fake_job.start(tmp_path, hosts=2, port=port, rendezvous=4.0, steps=30)
    code, said = fake_job.finish(_after(first, fake_job.start(tmp_path, hosts=2, port=port, rendezvous=4.0, steps=31)))
    assert code == 1
    assert "steps: 3" in said and "another configuration" in said
    fake_job.finish(first)


def _after(first, second):
    """Whichever of the two was refused ends at once; the other waits."""
    deadline = time.monotonic() + 30
    while first.poll() is None and second.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return first if first.poll() is not None else second


def test_a_stranger_at_the_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        job = fake_job.start(tmp_path, hosts=2, port=server.getsockname()[1])
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH\n")
        code, said = fake_job.finish(job)
    assert code == 1
    assert "MASTER_PORT" in said and "is not an erniekit job" in said and "SSH" in said


def test_strangers_at_the_rendezvous(tmp_path):
    """Junk, silence and a report in the right words: nothing is said to them, nobody waits, one line counts them."""
    port = free_port()
    first = fake_job.start(tmp_path, hosts=2, port=port, steps=30, max_restarts=1)
    silent = [knock(port) for _ in range(6)]
    stop = {"kind": "report", "id": "x", "attempt": 1, "stopping": True, "signs": [], "failures": [], "done": True}
    for junk in (b"GET / HTTP/1.0\r\n\r\n", json.dumps(stop).encode() + b"\n", os.urandom(3000)):
        with knock(port) as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(junk)
            with contextlib.suppress(OSError):  # the host may have closed the connection already
                stranger.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: stranger.recv(4096), b""))
            assert said.startswith(b"erniekit 2 rendezvous") and len(said) <= 96 and b"steps" not in said
    began = time.monotonic()
    second = fake_job.start(tmp_path, hosts=2, port=port, steps=30, max_restarts=1)
    ends = [fake_job.finish(job) for job in (first, second)]
    assert time.monotonic() - began < 15
    for each in silent:
        each.close()
    assert [code for code, _ in ends] == [0, 0], ends
    lines = [line for line in ends[0][1].splitlines() if "refused" in line]
    assert len(lines) == 1 and "without this job's token" in lines[0]
    assert "Traceback" not in ends[0][1] + ends[1][1]


def knock(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_host_with_another_token_is_refused(tmp_path):
    port = free_port()
    first = fake_job.start(tmp_path, hosts=2, port=port, node=0, rendezvous=3.0)
    knock(port).close()
    code, said = fake_job.finish(fake_job.start(tmp_path, hosts=2, port=port, node=1, token="another, long enough"))
    assert code == 1 and "ERNIEKIT_JOB_TOKEN" in said and "another token" in said
    assert fake_job.finish(first)[0] == 1


@pytest.mark.parametrize("same", [True, False])
def test_two_jobs_with_one_port(tmp_path, same):
    """The second one trains nothing, and says so: also if it is the same job, started twice."""
    port = free_port()
    first = [fake_job.start(tmp_path / "a", hosts=2, port=port, node=n, steps=60) for n in range(2)]
    fake_job.pids(tmp_path / "a", 2)
    steps = 60 if same else 61
    second = [fake_job.start(tmp_path / "b", hosts=2, port=port, node=n, steps=steps) for n in range(2)]
    for code, said in [fake_job.finish(job) for job in second]:
        assert code == 1
        assert "MASTER_PORT" in said and ("runs already" if same else "another configuration") in said
    assert [fake_job.finish(job)[0] for job in first] == [0, 0]


def test_a_spare_host_is_told_that_the_job_has_ended(tmp_path):
    port = free_port()
    keys = {"hosts": 2, "port": port, "steps": 60, "max_restarts": 1}
    jobs = [fake_job.start(tmp_path, **keys) for _ in range(2)]
    fake_job.pids(tmp_path, 2)
    code, said = fake_job.finish(fake_job.start(tmp_path, **keys), timeout=30)
    assert code == 1
    assert "can join it at its next restart" in said and "nothing was trained here" in said
    assert [fake_job.finish(job)[0] for job in jobs] == [0, 0]


@pytest.mark.slow
def test_one_node_number_twice(tmp_path):
    """Nobody is node 0; whoever owns MASTER_ADDR takes its place, so that the two meet."""
    port = free_port()
    jobs = [fake_job.start(tmp_path, hosts=2, port=port, node=1, rendezvous=5.0) for _ in range(2)]
    ends = [fake_job.finish(job) for job in jobs]
    assert [code for code, _ in ends] == [1, 1]
    assert sum("both say that they are node 1" in said and "PADDLE_NODE_RANK" in said for _, said in ends) == 1
