"""Threads sleep beside other programs and spin alone. The clock and the scheduler's count are given."""

import paddle
import pytest

from erniekit.utils import runtime
from erniekit.utils.thread_waits import ThreadWaits, blocktime_setter, waited_for_core


class Machine:
    """A thread's waiting for a core, which a test moves on with the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("KMP_BLOCKTIME", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        self.waited = 0.0
        self.blocktimes: list[int] = []
        self.waits = ThreadWaits(lambda: self.waited, self.blocktimes.append)
        self.waits._begin = self.now = 0.0

    def steps(self, count: int, share: float, seconds: float = 0.3) -> None:
        for _ in range(count):
            self.now += seconds
            self.waited += share * seconds
            self.waits.after_step(self.now)


def test_threads_sleep_beside_a_neighbour_and_spin_again_without(monkeypatch, capsys):
    machine = Machine(monkeypatch)
    machine.steps(5, 0.001)
    assert machine.blocktimes == [] and not machine.waits.sleep
    machine.steps(3, 0.2)
    assert machine.blocktimes == [0] and machine.waits.sleep
    machine.steps(3, 0.001)
    assert machine.blocktimes == [0], "three quiet windows are not yet enough"
    machine.steps(1, 0.07)  # neither busy nor quiet: counted anew
    machine.steps(4, 0.001)
    assert machine.blocktimes == [0, 200]
    machine.steps(1, 0.4)  # beyond doubt
    assert machine.blocktimes == [0, 200, 0]
    assert capsys.readouterr().err.count("other processes use this machine's cores") == 1


def test_bursts_of_the_runs_own_workers_are_no_neighbour(monkeypatch):
    machine = Machine(monkeypatch)
    for _ in range(10):
        machine.steps(1, 0.25)
        machine.steps(1, 0.04)
    assert machine.blocktimes == []


def test_their_work_does_not_keep_the_threads_asleep(monkeypatch):
    machine = Machine(monkeypatch)
    machine.steps(2, 0.2)
    machine.steps(4, 0.04)
    assert machine.blocktimes == [0, 200]


def test_short_steps_are_seen_together(monkeypatch):
    machine = Machine(monkeypatch)
    machine.steps(45, 0.2, seconds=0.01)
    assert machine.blocktimes == []
    machine.steps(15, 0.2, seconds=0.01)
    assert machine.blocktimes == [0]


@pytest.mark.parametrize("name", ["KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_a_users_choice_is_kept(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    waits = ThreadWaits(lambda: 100.0)
    assert waits._set is None
    waits.after_step(1e9)
    assert not waits.sleep


def test_paddles_own_runtime_takes_the_setting():
    setter = blocktime_setter()
    if setter is None:
        pytest.skip("this Paddle has no libiomp5.so")
    runtime.ensure_threads()
    x = paddle.randn([512, 512])
    expected = paddle.matmul(x, x)
    setter(0)
    try:
        assert paddle.equal_all(paddle.matmul(x, x), expected).item()
    finally:
        setter(200)


def test_the_scheduler_counts_on_linux():
    waited = waited_for_core()
    assert waited is None or waited >= 0.0
