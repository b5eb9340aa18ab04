"""The records of a worker, read as its agent reads them."""

import os
import subprocess
import sys

import pytest

from erniekit.utils import heartbeat

PREAMBLE = """
import os, sys, threading, time
from erniekit.utils import heartbeat
heartbeat.start(int(sys.argv[1]), os.getppid())
"""


@pytest.fixture
def beat():
    """Run lines in a process that beats; its last record, and its error if it left one."""

    def run(code: str) -> tuple[dict, dict | None]:
        memory = heartbeat.new_memory()
        command = [sys.executable, "-c", PREAMBLE + code, str(memory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[memory])
        assert done.returncode == 0, done.stderr
        record, error = heartbeat.last_record(memory), heartbeat.last_error(memory)
        os.close(memory)
        assert record is not None
        return record, error

    return run


WRITE = "heartbeat._worker.write()\n"


def test_without_an_agent_nothing_happens():
    code = "from erniekit.utils import heartbeat as h; h.step(1); h.waiting('x'); print(h.fail('text'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_it_beats_by_itself(beat):
    first, _ = beat("")
    later, _ = beat("time.sleep(1.5)\n")
    assert first["phase"] == "start" and first["step"] == 0
    assert later["time"] - later["since"] >= 1.0


def test_a_step_is_on_record_at_once(beat):
    record, _ = beat("heartbeat.step(3)\n")
    assert (record["step"], record["phase"], record["waiting"]) == (3, "training", None)
    assert record["at"].startswith("<string>:")


def test_the_main_threads_waits_count_and_no_others(beat):
    record, _ = beat(f"heartbeat.waiting('all_reduce')\n{WRITE}")
    assert record["waiting"] == "all_reduce"
    other = "t = threading.Thread(target=heartbeat.waiting, args=('a save',)); t.start(); t.join()\n"
    record, _ = beat(f"heartbeat.step(1)\n{other}{WRITE}")
    assert record["waiting"] is None


def test_the_longest_silence_is_of_steps_and_not_of_saves(beat):
    record, _ = beat(
        "heartbeat.step(1); time.sleep(0.2); heartbeat.waiting('x'); heartbeat.waiting(None)\n"
        "with heartbeat.phase('a save'):\n    heartbeat.waiting('y'); time.sleep(0.6); heartbeat.waiting(None)\n"
        f"heartbeat.step(2)\n{WRITE}"
    )
    assert 0.2 <= record["longest"] < 0.6
    assert record["phase"] == "training"


@pytest.mark.parametrize("waiting", [True, False])
def test_an_error_while_waiting_blames_a_peer(beat, waiting):
    _, error = beat(f"heartbeat.step(2)\nheartbeat.waiting('recv' if {waiting} else None)\nheartbeat.fail('text')\n")
    assert error is not None
    assert (error["text"], error["by_peer"], error["step"]) == ("text", waiting, 2)


def test_an_error_that_another_rank_told_blames_that_rank(beat):
    """The command line passes errors of other ranks on as such: the headline names the rank that met it first."""
    told = (
        "from erniekit.cli import main\nfrom erniekit.parallel import agree\n"
        "from erniekit.parallel.process_group import Group\n"
        "agree.comm.gather_objects = lambda value, group: ['the disk is full', value]\n"
        "try:\n    agree.agree({own}, Group((0, 1), 1))\nexcept Exception as error:\n"
        "    main._report('train', error)\n"
    )
    _, error = beat("heartbeat.step(2)\n" + told.format(own="None"))
    assert error is not None and error["by_peer"] and error["text"] == "error: rank 0: the disk is full"
    _, error = beat("heartbeat.step(2)\n" + told.format(own="agree.CheckpointError('mine')"))
    assert error is not None and not error["by_peer"]


def test_only_the_rank_that_streams_leaves_its_words_to_the_agent(beat):
    beat("assert heartbeat.fail('text') is False\n")
    beat("heartbeat._worker.streams = True\nassert heartbeat.fail('text') is True\n")


def test_a_read_of_the_device_is_a_wait_and_its_error_is_this_ranks_own(beat):
    record, _ = beat(f"heartbeat.step(1)\nwith heartbeat.device_read():\n    {WRITE}    os._exit(0)\n")
    assert record["waiting"] == "a read of the device"
    fails = "try:\n    with heartbeat.device_read():\n        raise RuntimeError\nexcept RuntimeError:\n"
    _, error = beat(f"heartbeat.step(2)\n{fails}    heartbeat.fail('text')\n")
    assert error is not None and not error["by_peer"]
