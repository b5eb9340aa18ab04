"""Rollouts from a server: this project's own on loopback, and answers that a training cannot use."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.loopback_server import KEY, serving
from support.rl_runs import rl_workspace

from erniekit import config
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.rl.rollout_server import RolloutServer
from erniekit.training.run import train
from erniekit.utils import http_json, runtime
from erniekit.utils.errors import ConfigError, TrainError

LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(LossPlot, "_draw", lambda self: None)
    monkeypatch.setattr(CompletionLog, "_draw", lambda self: None)
    monkeypatch.setenv(runtime.ROLLOUT_KEY_VARIABLE, KEY)
    monkeypatch.setattr(http_json, "MAX_WAIT", 0.01)
    return rl_workspace(tmp_path) | {"rollout_max_retries": 1, "save_strategy": "no"}


def run(keys: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    result = train(config.load(None, keys | changes, "train"))
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    return [step for step in map(json.loads, lines) if "loss" in step]


def test_our_own_server_generates_with_the_adapter_of_each_update(keys: dict[str, Any]):
    """Log-probabilities of the server are those of the training computation, before the first update and after it."""
    with serving(Path(keys["model_name_or_path"]), lora_directory=keys["output_dir"]) as url:
        steps = run(keys, **LORA, rollout_base_url=url, max_steps=6, num_generations=8, max_completion_length=40)
    first = [step for step in steps if "reward" in step]
    assert len(first) == 3
    for step in first:
        assert step["rollout/logp_difference/max"] < 1e-4 and step["completions/mean_length"] > 1
    left = sorted(path.name for path in (Path(keys["output_dir"]) / "rollout_weights").iterdir())
    assert left == ["out-step-4"]
    lines = [json.loads(line) for line in (Path(keys["output_dir"]) / "samples.jsonl").read_text().splitlines()]
    assert len({line["completion"] for line in lines}) > len(lines) // 2, "each sample has draws of its own"
    assert any(not line["truncated"] for line in lines), "the end token has a log-probability, too"


def test_a_server_with_other_weights_ends_the_run(keys: dict[str, Any]):
    """The command does nothing, so the second rollout is generated with the first weights."""
    with serving(Path(keys["model_name_or_path"])) as url:
        changes = {"rollout_base_url": url, "rollout_update_command": "test -f {directory}/config.json"}
        with pytest.raises(TrainError, match=r"log-probabilities differ from this run's by .* nats"):
            run(keys, **changes, learning_rate=0.1, rollout_tolerance=0.01)
        with pytest.raises(TrainError, match="rollout_update_command: ended with 1"):
            run(keys, **changes | {"rollout_update_command": "test -f {directory}/nothing"}, overwrite_output_dir=True)


def test_what_a_server_refuses_is_said(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = Path(keys["model_name_or_path"])
    with serving(model) as url:
        with pytest.raises(TrainError, match=r"does not load .* lora_directory"):
            run(keys, **LORA, rollout_base_url=url)
        with pytest.raises(ConfigError, match=r"rollout_model: other: http.* serves model"):
            run(keys, **LORA, rollout_base_url=url, rollout_model="other")
        monkeypatch.setenv(runtime.ROLLOUT_KEY_VARIABLE, "another-key")
        with pytest.raises(ConfigError, match="cannot be used: HTTP 401") as caught:
            run(keys, **LORA, rollout_base_url=url)
    assert "another-key" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be used: URLError.*Start the server"):
        run(keys, **LORA, rollout_base_url=url)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "temperature: 0.7: the log-probabilities of servers are those of temperature 1"),
        ({"fine_tuning": "Full"}, "rollout_update_command: needed with rollout_base_url unless fine_tuning: LoRA"),
        ({"rollout_update_command": "reload"}, r"rollout_update_command: it has to contain {directory}"),
        ({"router_replay": "r3"}, "router_replay: r3: the server of rollout_base_url does not say"),
        ({"rollout_dtype": "bf16"}, "rollout_dtype: the server"),
        ({"rollout_base_url": "localhost:1"}, "expected an address that begins with http"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config.load(None, keys | LORA | {"rollout_base_url": "http://127.0.0.1:1/v1"} | changes, "train")


# --- answers of other servers


class Other(ThreadingHTTPServer):
    """A server that answers /completions with `choice`, and /tokenize with `tokens`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.choice: dict[str, Any] = {}
        self.tokens: list[int] | None = None
        self.failures = 0
        self.bodies: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Other

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "base"}, {"id": "more"}]})

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.path == "/tokenize":
            self._answer(404 if self.server.tokens is None else 200, {"tokens": self.server.tokens})
        elif self.server.failures:
            self.server.failures -= 1
            self._answer(503, {})
        else:
            self._answer(200, {"choices": [self.server.choice]})

    def _answer(self, status: int, body: Any) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *rest: Any) -> None:
        return


@pytest.fixture
def other() -> Iterator[Other]:
    one = Other()
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def client(other: Other, keys: dict[str, Any]) -> RolloutServer:
    url = f"http://127.0.0.1:{other.server_port}/v1"
    cfg = config.load(None, keys | LORA | {"rollout_base_url": url}, "train")
    return RolloutServer(cfg, load_tokenizer(keys["model_name_or_path"]))


GOOD = {"token_ids": [4, 5, 2], "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]}, "finish_reason": "stop"}


def test_an_answer_of_a_server(other: Other, keys: dict[str, Any]):
    server = client(other, keys)
    other.choice, other.failures = GOOD, 1
    turn = server.complete([3, 7], 5, (2,), (9,), draw=1 << 200)
    assert (turn.ids, turn.stop_id, turn.logps) == ([4, 5], 2, [-1.0, -2.0, -3.0]) and server.num_retries == 1
    sent = other.bodies[-1]
    assert sent["prompt"] == [3, 7] and sent["stop_token_ids"] == [2] and sent["logit_bias"] == {"9": -100}
    assert 0 <= sent["seed"] < 2**63 and sent["temperature"] == 1 and sent["top_k"] == -1
    older = {"logprobs": GOOD["logprobs"] | {"tokens": ["token_id:4", "token_id:5", "token_id:2"]}}
    other.choice = older | {"finish_reason": "length"}
    turn = server.complete([3, 7], 3, (2,), (), draw=1)
    assert (turn.ids, turn.stop_id) == ([4, 5, 2], None)
    assert other.bodies[-1]["seed"] != sent["seed"] and "logit_bias" not in other.bodies[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": None}, "no log-probabilities"),
        ({"logprobs": {"token_logprobs": [-1.0, None, -1.0]}}, "no log-probabilities"),
        ({"token_ids": None}, "no ids of this model's vocabulary"),
        ({"token_ids": None, "logprobs": GOOD["logprobs"] | {"tokens": ["4", "5", "2"]}}, "no ids of this model's"),
        ({"token_ids": [4, 10**6, 2]}, "no ids of this model's vocabulary"),
        ({"token_ids": [4, 5]}, "3 log-probabilities for 2 tokens"),
        ({"prompt_token_ids": [1, 3, 7]}, "other tokens than those of the prompt"),
        ({"token_ids": [4, 5, 6]}, "ended an answer with token 6"),
    ],
)
def test_an_answer_that_cannot_be_used(other: Other, keys: dict[str, Any], changes: dict[str, Any], message: str):
    other.choice = GOOD | changes
    with pytest.raises(TrainError, match=message):
        client(other, keys).complete([3, 7], 5, (2,), (), draw=0)
    assert len(other.bodies) == 1, "asking again would change nothing"


def test_a_server_that_fails_again_and_again(other: Other, keys: dict[str, Any]):
    other.failures = 10
    with pytest.raises(TrainError, match=r"rollout_base_url: .*HTTP 503"):
        client(other, keys).complete([3, 7], 5, (2,), (), draw=0)
    assert len(other.bodies) == 2


def test_another_tokenizer_is_refused(other: Other, keys: dict[str, Any]):
    tokenizer, server = load_tokenizer(keys["model_name_or_path"]), client(other, keys)
    other.tokens = [5, 6, 7]
    with pytest.raises(ConfigError, match="with another tokenizer than this run's"):
        server.check()
    other.tokens = tokenizer.encode(other.bodies[-1]["prompt"])
    server.check()
    other.tokens = None  # no such route: said, not refused
    server.check()
    assert server.model == "base"
