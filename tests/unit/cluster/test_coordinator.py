"""What hosts agree on, without hosts: messages in, answers out, and a clock that the test turns."""

import dataclasses
import signal

from erniekit.cluster.coordinator import GONE, GRACE, GRACE_FOR_PEERS, Coordinator
from erniekit.cluster.job import Layout, Limits
from erniekit.cluster.watch import Sign

LIMITS = Limits(fault=30.0, rendezvous=600.0)
LAYOUTS = (Layout(4), Layout(2, ("--data_parallel_degree=1",), "smaller"))


class Host:
    """An agent with two slots that says what it is told to say."""

    def __init__(self, coordinator: Coordinator, number: int, node: int | None = None):
        self.coordinator, self.id, self.node, self.number = coordinator, f"id-{number}", node, number

    def say(self, kind: str, now: float, **fields):
        return self.coordinator.handle({"kind": kind, "id": self.id, **fields}, now)

    def hello(self, now: float = 0.0, **fields):
        about = {"name": f"host{self.number}", "address": f"10.0.0.{self.number}", "node": self.node, "slots": 2}
        about |= {"master": self.number == 0, "ports": [self.number * 10 + i for i in range(3)], "config": {}}
        about |= {"again": [f"again, says host{self.number}"]}
        self.start = self.say("hello", now, **(about | fields))
        return self.start

    def report(self, now: float, failures=(), done: bool = False, stopping: bool = False, **fields):
        ranks = range(self.start["first"], self.start["first"] + self.start["count"])
        signs = [dataclasses.replace(Sign(rank, 7, "training", None, 0.5, 0.1, 0.1), **fields) for rank in ranks]
        return self.say(
            "report",
            now,
            attempt=self.start["attempt"],
            signs=[dataclasses.asdict(sign) for sign in signs],
            failures=list(failures),
            done=done,
            stopping=stopping,
        )


def failure(rank: int, age: float = 0.0, code: int = 70, by_peer: bool = False):
    what = f"ended with exit code {code}"
    return {
        "rank": rank,
        "at": age,
        "what": what,
        "code": code,
        "by_peer": by_peer,
        "step": 7,
        "detail": f"words {rank}",
    }


def job(limits: Limits = LIMITS, nodes=(None, None)):
    coordinator = Coordinator(2, LAYOUTS, limits)
    hosts = [Host(coordinator, number, node) for number, node in enumerate(nodes)]
    for _ in range(2):
        for host in hosts:
            host.hello()
    return hosts


def test_ranks_and_addresses():
    a, b = job()
    assert (a.start["first"], b.start["first"], a.start["count"], a.start["world"]) == (0, 2, 2, 4)
    assert a.start["store"] == "10.0.0.0:0"
    assert a.start["endpoints"] == b.start["endpoints"] == ["10.0.0.0:1", "10.0.0.0:2", "10.0.0.1:11", "10.0.0.1:12"]


def test_the_schedulers_numbers_decide_the_order():
    a, b = job(nodes=(1, 0))
    assert (a.start["first"], b.start["first"]) == (2, 0)
    assert a.start["store"] == "10.0.0.1:10"


def test_two_hosts_of_one_number_are_refused():
    coordinator = Coordinator(2, LAYOUTS, LIMITS)
    Host(coordinator, 0, node=0).hello()
    reply = Host(coordinator, 1, node=0).hello()
    assert reply["kind"] == "refused" and "both say that they are node 0" in reply["why"]


def test_the_cause_is_told_from_its_consequences():
    """Rank 0 blames a peer and reports first; rank 3's own error is younger but for the report's age."""
    a, b = job()
    assert a.report(10.0, [failure(0, by_peer=True), failure(1, code=-signal.SIGABRT)])["kind"] == "run"
    assert b.report(10.5, [failure(3, age=0.6)])["kind"] == "run"
    reply = b.report(10.0 + GRACE + 0.1, [failure(3, age=1.2)])
    assert reply["kind"] == "stop" and not reply["restart"]
    assert reply["headline"].startswith("rank 3 on host1") and reply["detail"] == "words 3" and reply["code"] == 70
    assert a.report(12.0)["detail"] == "words 3"
    assert a.coordinator.all_know_end


def test_whoever_blames_a_peer_is_believed_for_a_while():
    a, b = job()
    a.report(10.0, [failure(0, by_peer=True)])
    assert b.report(10.0 + GRACE_FOR_PEERS - 0.5)["kind"] == "run"
    reply = b.report(10.0 + GRACE_FOR_PEERS + 0.5)
    assert reply["kind"] == "stop" and "rank 0" in reply["headline"]


def test_all_done():
    a, b = job()
    assert a.report(10.0, done=True)["kind"] == "run"
    reply = b.report(11.0, done=True)
    assert (reply["kind"], reply["code"], reply["restart"]) == ("stop", 0, False)


def test_a_failure_after_a_host_was_done_counts():
    a, b = job()
    a.report(10.0, done=True)
    b.report(10.1, [failure(2), failure(3)])
    assert a.report(11.2, done=True)["code"] == 70


def test_a_silent_host():
    a, b = job()
    b.report(1.0)
    for now in range(2, 21):
        assert a.report(float(now))["kind"] == "run"
    reply = a.report(1.0 + LIMITS.detect + 1.5)
    assert reply["kind"] == "stop"
    assert "lost with its host (ranks 2 to 3): its agent has sent nothing" in reply["headline"]


def test_elastic_and_a_host_that_comes_too_late():
    a, b = job(Limits(30.0, 600.0, max_restarts=1, elastic=True))
    b.report(9.0)
    b.coordinator.disconnect(b.id, 10.0)
    assert a.report(10.0 + GONE - 0.5)["kind"] == "run"
    reply = a.report(10.0 + GONE + GRACE)
    assert reply["kind"] == "stop" and reply["restart"]
    assert a.hello(20.0)["kind"] == "wait"
    assert a.hello(49.0)["kind"] == "wait"
    assert a.hello(50.5)["kind"] == "start"
    assert (a.start["world"], a.start["attempt"], a.start["note"]) == (2, 2, "smaller")
    late = Host(a.coordinator, 2)
    assert late.hello(51.0)["kind"] == "wait" and "next restart" in late.start["why"]


def test_without_elastic_the_job_waits_for_the_lost_host():
    a, b = job(Limits(30.0, 100.0, max_restarts=1))
    b.report(9.0)
    b.coordinator.disconnect(b.id, 10.0)
    a.report(10.0 + GONE + GRACE)
    for now in range(20, 120, 10):
        assert a.hello(float(now))["kind"] == "wait"
    reply = a.hello(121.0)
    assert (
        reply["kind"] == "stop"
        and "hosts that have come: 1 of 2" in reply["detail"]
        and "after 100 s" in reply["detail"]
    )


def test_all_hosts_start_again_as_the_master_says():
    """A host that has come back knows less of what was saved: its own arguments would differ from the master's."""
    a, b = job(dataclasses.replace(LIMITS, max_restarts=1))
    assert a.start["overrides"] == b.start["overrides"] == []
    a.report(10.0, [failure(0)])
    a.report(10.0 + GRACE + 0.1, [failure(0, age=GRACE)])
    for host in (b, a, b):
        host.hello(20.0)
    assert a.start["attempt"] == b.start["attempt"] == 2
    assert a.start["overrides"] == b.start["overrides"] == ["again, says host0"]


def test_nothing_starts_again_once_the_job_was_told_to_stop():
    a, b = job(Limits(30.0, 600.0, max_restarts=5))
    a.report(10.0, stopping=True)
    b.report(11.0, [failure(2)])
    reply = b.report(13.0)
    assert not reply["restart"] and "asked to stop" in reply["headline"]


def test_a_host_that_leaves_ends_the_job_at_once():
    a, b = job(Limits(30.0, 600.0, max_restarts=5))
    b.report(9.9)
    b.say("leave", 10.0, why="interrupted by Ctrl-C")
    reply = a.report(10.1)
    assert reply["kind"] == "stop" and not reply["restart"] and "interrupted by Ctrl-C" in reply["headline"]


def test_a_hanging_rank_is_found_across_hosts():
    a, b = job()
    a.report(15.0)
    b.report(16.0)
    a.report(29.0, waiting="all_reduce", idle=25.0)
    reply = b.report(30.0, idle=26.0, at="x.py:1 in f")
    assert reply["kind"] == "stop" and "rank 2 on host1" in reply["headline"] and "x.py:1 in f" in reply["headline"]
    assert "raise distributed_timeout (now 30)" in reply["detail"]


def test_a_late_host_is_refused_when_the_job_can_have_no_place_for_it():
    a, _ = job()
    late = Host(a.coordinator, 2)
    reply = late.hello(10.0)
    assert reply["kind"] == "refused" and "runs already, on host0 (10.0.0.0), host1" in reply["why"]
    assert "MASTER_PORT" in reply["why"]


def test_a_host_of_another_job_is_refused_at_any_time():
    a, b = job(Limits(30.0, 600.0, max_restarts=1))
    assert "steps: 7 here, - there" in Host(a.coordinator, 2).hello(10.0, config={"steps": "7"})["why"]
    for host in (a, b):
        host.report(11.0, done=True)
    assert Host(a.coordinator, 3).hello(12.0, config={"steps": "7"})["kind"] == "refused"


def test_a_spare_is_waited_for_and_told_that_nothing_was_trained_on_it():
    a, b = job(Limits(30.0, 600.0, max_restarts=1))
    spare = Host(a.coordinator, 2)
    assert spare.hello(10.0)["kind"] == "wait"
    for host in (a, b, a):
        host.report(11.0, done=True)
    assert not a.coordinator.all_know_end
    reply = spare.hello(11.5)
    assert (reply["kind"], reply["restart"], reply["code"]) == ("stop", False, 1)
    assert "nothing was trained here" in reply["headline"]
    assert a.coordinator.all_know_end


def test_a_spare_that_has_gone_is_not_waited_for():
    a, b = job(Limits(30.0, 600.0, max_restarts=1))
    spare = Host(a.coordinator, 2)
    spare.hello(10.0)
    a.coordinator.disconnect(spare.id, 10.5)
    for host in (a, b, a):
        host.report(11.0, done=True)
    assert a.coordinator.all_know_end


def test_a_report_of_a_host_that_is_not_in_the_attempt():
    a, _ = job()
    stranger = Host(a.coordinator, 2)
    stranger.start = a.start
    assert stranger.report(10.0)["kind"] == "stop"
    assert a.report(10.1)["kind"] == "run"
