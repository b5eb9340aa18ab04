import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.data_runs import build, config, numbered_conversations, run, same, steps, write
from support.fake_text import FakeTemplate, FakeTokenizer

from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.loader import build_loader
from erniekit.data.workers import EncoderSpec
from erniekit.utils import stop_signals
from erniekit.utils.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return numbered_conversations(tmp_path_factory.mktemp("data"))


def test_a_template_reaches_a_worker_with_its_tokenizer():
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "examples" / "models" / "tiny-moe")
    spec = EncoderSpec(tokenizer, 64, template=load_template(tokenizer, "text"))
    sent = pickle.loads(pickle.dumps(spec))
    assert sent.template.tokenizer is sent.tokenizer  # not a second copy, which may be large
    record = ("erniekit", b'{"src": ["q"], "tgt": ["a"]}', "a.jsonl:1")
    [ours], [theirs] = (each.make()(*record).documents for each in (spec, sent))
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.labels.tolist() == theirs.labels.tolist()


def pid_of_workers(parent):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    ).stdout
    return [int(pid) for pid in found.split()]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "erniekit-data"]


@pytest.fixture
def long_data(tmp_path):
    return write(tmp_path / "long.jsonl", [{"src": "q", "tgt": "a" * (1 + i % 50)} for i in range(3000)])


def test_workers_give_the_same_stream_and_close_ends_them(long_data):
    keys = {"max_steps": 100, "max_estimate_samples": 1}
    loader = build(long_data, dataloader_num_workers=2, **keys)
    assert same(steps(loader, 60), run(long_data, 60, **keys))
    workers = [worker.process for worker in loader._feed._service._workers]
    assert len(workers) == 2 and all(worker.poll() is None for worker in workers) and data_threads()
    loader.close()
    assert all(worker.poll() is not None for worker in workers) and not data_threads()
    assert same([loader.next_step()], [run(long_data, 61, **keys)[-1]])  # it can go on after close()
    loader.close()


def test_a_worker_of_an_endless_stream_that_is_remembered_whole(data):
    with build(data, dataloader_num_workers=1, max_steps=100) as loader:
        assert same(steps(loader, 60), run(data, 60, max_steps=100))


def test_a_loader_that_is_forgotten_ends_its_thread_and_workers(long_data):
    loader = build(long_data, dataloader_num_workers=1, max_steps=100)
    loader.next_step()
    workers = [worker.process for worker in loader._feed._service._workers]
    assert data_threads() and workers
    del loader
    gc.collect()
    assert not data_threads() and all(worker.poll() is not None for worker in workers)


def test_the_queue_is_bounded(data):
    made = []

    class Counting(FakeTemplate):
        def encode_all(self, *arguments):
            made.append(1)
            return super().encode_all(*arguments)

    cfg = config(data, packing=True, greedy_intokens=False, max_steps=10**6, max_estimate_samples=1, prefetch_factor=3)
    with build_loader(cfg, FakeTokenizer(), template=Counting()) as loader:
        first = loader.next_step()
        before = -1
        while before < len(made) < 10_000:  # until it rests
            before = len(made)
            time.sleep(0.3)
        per_step = first[0].num_samples + first[1].num_samples
        assert len(made) < 12 * per_step + 2 * 64


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_sample_reaches_next_step_with_its_place_after_the_steps_before_it(tmp_path, workers):
    records = [{"src": "q", "tgt": "a" * 10} for _ in range(200)]
    records[150] = {"src": "q", "tgt": "b" * 100}
    path = write(tmp_path / "a.jsonl", records)
    keys = {"truncation": "error", "packing": False, "random_shuffle": False, "dataloader_num_workers": workers}
    with build(path, **keys) as loader:
        assert len(steps(loader, 32)) == 32  # of 37 whole steps before the bad sample; its window of 64 is read at once
        for _ in range(2):
            with pytest.raises(DataError, match=r"a.jsonl:151: its last turn alone has 104 tokens"):
                steps(loader)


@pytest.mark.parametrize(("policy", "workers"), [("error", 0), ("skip", 0), ("skip", 1)])
def test_a_sample_that_the_template_refuses_is_a_bad_line_too(tmp_path, policy, workers):
    path = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a"}, {"src": "refuse", "tgt": "a"}])
    with build(path, on_bad_line=policy, dataloader_num_workers=workers) as loader:
        if policy == "error":
            with pytest.raises(DataError, match=r"a\.jsonl:2: the template refuses"):
                loader.next_step()
        else:
            assert len(steps(loader)) == 1 and loader.report()["dropped"] == 1


def test_a_signal_to_all_processes_of_a_job_ends_no_worker(long_data):
    """As schedulers and a terminal that is closed send it: the trainer needs its workers to finish the step."""
    keys = {"max_steps": 1000, "max_estimate_samples": 1}
    with build(long_data, dataloader_num_workers=1, prefetch_factor=1, **keys) as loader:
        first = loader.next_step()
        (worker,) = loader._feed._service._workers
        for number in stop_signals.SIGNALS:
            worker.process.send_signal(number)
        assert same([first, *steps(loader, 99)], run(long_data, 100, **keys))


def test_a_worker_that_dies_is_an_error_and_not_a_hang(long_data):
    with build(
        long_data, dataloader_num_workers=1, max_steps=1000, max_estimate_samples=1, prefetch_factor=1
    ) as loader:
        loader.next_step()
        for worker in list(loader._feed._service._workers):
            os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(
            DataError, match=r"a data worker ended unexpectedly \(exit code -9\).*dataloader_num_workers"
        ):
            steps(loader, 500)


SCRIPT = """
import sys
sys.path[:] = {sys_path!r}
from support.data_runs import PACKINGS, build, config, lines_of, rows_of, run, same, steps, write
from support.fake_text import FakeTemplate, FakeTokenizer
from erniekit.data.loader import build_loader
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
loader = build_loader(config({path!r}, **{keys!r}), FakeTokenizer(), template=FakeTemplate())
for _ in range(3):
    loader.next_step()
print("ready", "paddle" in sys.modules, flush=True)
{then}
"""


def start_trainer(path, then):
    keys = {"dataloader_num_workers": 2, "max_steps": 10**6, "max_estimate_samples": 1}
    script = SCRIPT.format(sys_path=sys.path, path=str(path), keys=keys, then=then)
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready False\n"
    return trainer


def test_workers_end_when_the_trainer_is_killed(long_data):
    trainer = start_trainer(long_data, "import time; time.sleep(60)")
    workers = pid_of_workers(trainer.pid)
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.parametrize("then", ["pass", "raise SystemExit(0)"])
def test_a_trainer_that_never_closes_its_loader_still_exits(long_data, then):
    trainer = start_trainer(long_data, then)
    assert trainer.wait(timeout=20) == 0
