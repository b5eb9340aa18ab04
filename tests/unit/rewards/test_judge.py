"""The judge, asked over HTTP: a small server of this process stands in for the other model."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards import Sample, Scorer, judge
from erniekit.utils import http_json, log
from erniekit.utils.errors import ConfigError

KEY = "a-secret-key"


class Server(ThreadingHTTPServer):
    """Answers with the replies that it is given, in order; the last one is repeated. `seen`: (headers, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[tuple[int, Any]] = []
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((dict(self.headers), {"path": self.path, **body}))
            status, reply = self.server.replies[0]
            if len(self.server.replies) > 1:
                self.server.replies.pop(0)
        text = reply(body) if callable(reply) else reply
        if status == 200 and isinstance(text, str):
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            text = {"choices": [{"message": {"content": text}}], "usage": usage}
        payload = json.dumps(text).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *rest: Any) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(judge.KEY_VARIABLE, KEY)
    monkeypatch.setattr(http_json.time, "sleep", lambda seconds: None)
    one = Server()
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def arguments(server: Server, **keys: Any) -> RewardArgs:
    address = f"http://127.0.0.1:{server.server_port}/v1"
    return RewardArgs(reward_funcs=("judge",), judge_base_url=address, judge_model="m", **keys)


def sample(text: str) -> Sample:
    return Sample([{"role": "user", "content": "Why?"}], text, (1,), {"answer": "Because."}, "d:1")


def by_length(body: dict[str, Any]) -> str:
    return f"Fine. Score: {body['messages'][0]['content'].count('ж')}"


def test_marks_become_rewards_and_are_kept(server: Server, tmp_path: Path):
    server.replies = [(200, by_length)]
    cfg = arguments(server, judge_cache=str(tmp_path / "marks.jsonl"))
    samples = [sample("ж"), sample("жжж"), sample("ж")]
    with Scorer(cfg) as one:
        table = one.score(samples)
        again = one.score(samples)
    np.testing.assert_allclose(table.values["judge"], [0.1, 0.3, 0.1])
    np.testing.assert_array_equal(again.total, table.total)
    assert len(server.seen) == 2
    assert table.metrics == {
        "judge/requests": 2,
        "judge/cached": 1,
        "judge/prompt_tokens": 14,
        "judge/completion_tokens": 6,
    }
    headers, body = server.seen[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "m", 0)
    assert "Why?" in body["messages"][0]["content"] and "Because." in body["messages"][0]["content"]
    with (tmp_path / "marks.jsonl").open("a") as file:
        file.write('{"question": "unfinis')
    with log.captured() as lines, Scorer(cfg) as later:
        np.testing.assert_array_equal(later.score(samples).total, table.total)
    assert len(server.seen) == 2
    assert any("skipped 1 line that cannot be read as a mark" in text for _, text in lines)
    with Scorer(cfg) as later:
        later.score([sample("жж")])
    with Scorer(cfg) as later:
        assert later.score([sample("жж")]).metrics["judge/cached"] == 1
    assert len(server.seen) == 3, "the mark behind the unfinished line was kept"


def test_marks_of_another_scale_are_not_taken_from_the_cache(server: Server, tmp_path: Path):
    server.replies = [(200, "Score: 5")]
    (tmp_path / "judge.txt").write_text("Mark {completion}.", encoding="utf-8")
    keys = {"judge_prompt": str(tmp_path / "judge.txt"), "judge_cache": str(tmp_path / "marks.jsonl")}
    for best, reward in ((10.0, 0.5), (5.0, 1.0), (10.0, 0.5)):
        with Scorer(arguments(server, judge_max_score=best, **keys)) as one:
            assert one.score([sample("x")]).total.tolist() == [reward]
    assert len(server.seen) == 2


def test_errors_that_may_pass_are_repeated(server: Server):
    server.replies = [(503, {}), (429, {}), (200, {"choices": []}), (200, "7/10\n\n7")]
    with Scorer(arguments(server)) as one:
        table = one.score([sample("x")])
    assert table.total.tolist() == [0.7]
    assert table.metrics["judge/retries"] == 3


@pytest.mark.parametrize(
    ("status", "reply", "expected", "requests"),
    [
        (401, {"error": f"wrong key {KEY}"}, r"HTTP 401 Unauthorized: .*wrong key \*\*\*", 1),
        (302, {}, "HTTP 302", 1),
        (500, {}, "HTTP 500", 3),
        (200, "I like it.", "the judge gave no mark: 'I like it.'", 1),
        (200, "Score: 11", "the mark 11, which is not from 0 to judge_max_score", 1),
        (200, {"choices": [{"message": {"content": None}}]}, "the answer has no text", 3),
    ],
)
def test_a_failure_is_no_mark_of_0(server: Server, status: int, reply: Any, expected: str, requests: int):
    server.replies = [(status, reply)]
    cfg = arguments(server, judge_max_retries=2, reward_max_failures=1.0)
    with log.captured() as lines, Scorer(cfg) as one:
        table = one.score([sample("x")])
    assert np.isnan(table.total).all() and table.failures == {"judge": 1}
    assert len(server.seen) == requests
    assert len(lines) == 1 and "reward judge: d:1:" in lines[0][1]
    assert re.search(expected, lines[0][1])
    assert KEY not in lines[0][1]


def test_a_server_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_json.time, "sleep", lambda seconds: None)
    monkeypatch.delenv(judge.KEY_VARIABLE, raising=False)
    cfg = RewardArgs(
        reward_funcs=("judge",), judge_base_url="http://127.0.0.1:1/v1", judge_model="m", reward_max_failures=1.0
    )
    with log.captured() as lines, Scorer(cfg) as one:
        assert np.isnan(one.score([sample("x")]).total).all()
    assert lines[0][1].startswith("judge: no key: the environment variable")
    assert "Connection refused" in lines[1][1]


def test_the_instruction_is_replaced_and_checked(server: Server, tmp_path: Path):
    server.replies = [(200, "Score: 5")]
    file = tmp_path / "judge.txt"
    file.write_text("Mark {completion} against {answer}; ask nothing about {other}.", encoding="utf-8")
    with Scorer(arguments(server, judge_prompt=str(file))) as one:
        one.score([sample("{answer}")])
    assert server.seen[0][1]["messages"][0]["content"] == "Mark {answer} against Because.; ask nothing about {other}."
    file.write_text("nothing", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the text has no \{completion\}"):
        Scorer(arguments(server, judge_prompt=str(file)))
    with pytest.raises(ConfigError, match=r"judge_cache: .*there is no directory"):
        Scorer(arguments(server, judge_cache=str(tmp_path / "no" / "marks.jsonl")))
    with pytest.raises(ConfigError, match=r"judge_cache: .* cannot be used: Is a directory"):
        Scorer(arguments(server, judge_cache=str(tmp_path)))


def test_a_cache_that_cannot_be_written_costs_no_reward(server: Server, tmp_path: Path):
    server.replies = [(200, "Score: 5")]
    cache = tmp_path / "marks.jsonl"
    with log.captured() as lines, Scorer(arguments(server, judge_cache=str(cache))) as one:
        cache.mkdir()  # as good as a full disk
        assert one.score([sample("x"), sample("y")]).total.tolist() == [0.5, 0.5]
    assert [text for is_warning, text in lines if is_warning and "judge_cache" in text] == [
        f"judge_cache: {cache}: marks cannot be written (Is a directory): later runs will ask for them again"
    ]


def test_marks_in_replies():
    assert judge.mark_of("Score: 3 or rather\nScore: 4.5") == 4.5
    assert judge.mark_of("**Score:** 8/10") == 8
    assert judge.mark_of("得分：6") == judge.mark_of("评分: 6分") == 6
    assert judge.mark_of("Score (0-10): 7") == 7 and judge.mark_of("Score (7)") == 7
    assert judge.mark_of("Score: .5") == 0.5
    assert judge.mark_of("Score: -3") == judge.mark_of("-3") == -3, "it is out of range, and no mark of 3"
    assert judge.mark_of("Score - 7") == judge.mark_of("- 7") == 7
    assert judge.mark_of("good\n7") == 7
    assert judge.mark_of("") is None
    assert judge.mark_of("7 reasons to like it") is None


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_on_this_machine(server: Server) -> None:
    server.replies = [(200, "Score: 7")]
    ask = (
        "import sys; from erniekit.utils.http_json import JsonClient as C; C(sys.argv[1], '', 5, 0, 999).post('/x', {})"
    )
    environ = dict(os.environ) | {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    for host in ("127.0.0.1", "localhost"):
        address = f"http://{host}:{server.server_port}/v1"
        subprocess.run([sys.executable, "-c", ask, address], env=environ, check=True, timeout=60)
    assert len(server.seen) == 2


def test_an_address_that_cannot_be_read_fails_when_it_is_asked() -> None:
    with pytest.raises(http_json.RequestFailed, match="ValueError"):
        http_json.JsonClient("http://[::1/v1", "", 1, 0, 999).ask("/x")
