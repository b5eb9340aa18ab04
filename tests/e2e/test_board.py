"""The board in a headless Chromium, as a user sees it. Skipped where there is none."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.browser import CHROMIUM, DRIVER, PATIENCE, BoardProcess, Page, browser
from support.source_tree import REPOSITORY

from erniekit.board import job
from erniekit.board.app import STRINGS
from erniekit.board.forms import values
from erniekit.config import load
from erniekit.config.reference import by_group

FIELDS = (  # the values of the fields of given keys
    "Object.fromEntries([...document.querySelectorAll('.field.given')].map("
    "(field) => [field.dataset.key, field.querySelector('input, select').value]))"
)
OF_TRAIN = {entry.name for entries in by_group("train").values() for entry in entries}
HAS_BROWSER = bool(CHROMIUM and DRIVER and importlib.util.find_spec("selenium"))
pytestmark = pytest.mark.skipif(not HAS_BROWSER, reason="needs chromium, chromedriver and selenium")
TINY = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "examples/configs/tiny").rglob("*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module")
def board(root: Path) -> Iterator[BoardProcess]:
    board = BoardProcess(root / "runs", root.parent)
    yield board
    board.end()


@pytest.fixture(scope="module")
def page(root: Path, board: BoardProcess) -> Iterator[Page]:
    with browser(root / "profile") as page:
        page.open(board.link)
        page.wait(lambda: page.js("document.body.dataset.page") == "runs")
        yield page


def test_every_page_in_both_languages_is_silent_and_asks_this_machine_alone(page: Page, board: BoardProcess):
    for language in ("en", "zh"):
        page.open(board.address)
        if page.js("document.documentElement.lang")[:2] != language:
            page.click("#language")
            page.wait(lambda: (page.js("document.documentElement.lang") or "")[:2] == language, language)  # noqa: B023
        links = page.js("[...document.querySelectorAll('nav a')].map((a) => a.href)")
        assert len(links) == 8
        for link in [*links, f"{board.address}/login", f"{board.address}/run/none"]:
            page.open(link)
            text = page.text("main")
            assert text.strip() and "undefined" not in text and "[object" not in text, link
        page.open(f"{board.address}/new?command=train")
        assert page.text("h1") == STRINGS[language]["new"]
        problems = [line for line in page.problems() if "/run/none" not in line]  # Chromium logs its status, 400
        assert problems == [], language
    page.driver.set_window_size(600, 900)
    for link in links:
        page.open(link)
        assert page.js("document.documentElement.scrollWidth <= innerWidth"), f"{link} is wider than a narrow window"
    page.driver.set_window_size(1440, 1000)
    page.click("#language")
    page.click("#theme")
    page.wait(lambda: page.js("document.documentElement.dataset.theme") == "dark", "dark")


def test_the_form_shows_each_example_and_keeps_it(page: Page, board: BoardProcess, tmp_path: Path):
    page.open(f"{board.address}/new?command=train")
    for name in TINY:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        page.choose("#source", f"example:{name}")
        page.wait(lambda: page.js("$('yaml').value") == text, name)  # noqa: B023
        shown = {key: value for key, value in values(text).items() if key in OF_TRAIN}
        shown = {key: value.lower() for key, value in shown.items()}
        page.wait(lambda: {k: v.lower() for k, v in page.js(FIELDS).items()} == shown, name)  # noqa: B023
    page.js("[...document.querySelectorAll('details')].map((group) => { group.open = true; })")
    page.type("#f-max_steps", "many\t")
    page.wait(lambda: "expected an integer" in page.text("[data-key=max_steps] .problem"), "the error")
    assert not page.find("#start").is_enabled()
    page.type("#f-max_steps", "7\t")
    page.wait(lambda: "max_steps: 7\n" in page.js("$('yaml').value") and page.find("#start").is_enabled(), "no error")
    (tmp_path / "a.yaml").write_text(page.js("$('yaml').value"), encoding="utf-8")
    assert load(str(tmp_path / "a.yaml")).max_steps == 7
    page.type("#search", "learning rate at the end")
    page.wait(lambda: page.js("[...document.querySelectorAll('.field')].filter((f) => f.offsetParent).length") < 10)
    assert page.problems() == []


def test_a_run_of_reinforcement_learning(page: Page, board: BoardProcess, root: Path):
    """Many curves, of which the first are those that matter, values that are no numbers or hardly differ, samples."""
    output = root / "runs" / "by-hand"
    output.mkdir()
    names = ["reward", "eval_reward", "entropy", *(f"rollout/part{number}" for number in range(40))]
    with open(output / "metrics.jsonl", "w") as file:
        for step in range(1, 30):
            same: dict[str, float | None] = dict.fromkeys(names, 1 + step % 2 * 2e-16)
            same |= {"entropy": None} if step == 9 else {}
            file.write(json.dumps({"step": step, "loss": float("nan") if step == 7 else 1 / step, **same}) + "\n")
    samples = [
        {"step": 1, "prompt": [{"role": "user", "content": "Sort: 3 1"}], "completion": "<i>1 3", "reward": 1 / 3}
    ]
    (output / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page.open(f"{board.address}/run/by-hand")
    page.wait(lambda: page.js("document.querySelectorAll('#more-charts canvas').length") == 32, "the curves")
    titles = page.js("[...document.querySelectorAll('#charts h3')].map((title) => title.textContent)")
    assert titles[:4] == ["loss", "reward", "eval_reward", "entropy"] and len(titles) == 12
    assert "32" in page.text("#more summary") and not page.find("#log-part").is_displayed()
    assert all(word in page.text("#remarks") for word in ("loss", "step 7", "entropy", "step 9"))
    page.js("($('more').open = true)")
    page.wait(lambda: page.js("document.querySelector('#more-charts canvas').clientWidth") > 200, "wide curves")
    cells = page.js("[...document.querySelectorAll('#samples td')].map((cell) => cell.textContent)")
    assert cells == ["1", "user: Sort: 3 1", "<i>1 3", "0.33333"]
    assert page.problems() == []
    shutil.rmtree(output)
    page.wait(lambda: page.text("#toasts"), "a message")
    time.sleep(3)  # another poll
    assert page.text("#toasts") == "there is no run 'by-hand'", "it is said once"
    page.open(board.address)  # the page of a run that is gone goes on asking for it
    page.problems()


def test_a_run_by_clicks_outlives_its_tab_and_its_board(root: Path, workspace: Path):
    """Started by a click; the tab is closed and the board killed; another board finds it, stops and resumes it."""
    text = (workspace / "run.yaml").read_text().replace("max_steps: 6", "max_steps: 100000")
    text = text.replace("save_steps: 2", "save_steps: 1000")
    runs = root / "outlives"
    board = BoardProcess(runs, root.parent)
    try:
        with browser(root / "first") as page:
            page.open(board.link)
            page.open(f"{board.address}/new?command=train")
            page.js("($('yaml').value = arguments[0], $('yaml').dispatchEvent(new Event('input')))", text)
            page.type("#name", "long")
            page.wait(lambda: page.find("#start").is_enabled() and "long" in page.text("#words"), "start")
            page.click("#start")
            page.wait(lambda: page.js("location.pathname") == "/run/long", "its page")
            page.wait(lambda: page.js("!!document.querySelector('#chart-loss canvas')"), "a curve")
            page.wait(lambda: "training begins" in page.text("#log"), "the log")
            assert page.problems() == []
        board.end(signal.SIGKILL)
        metrics = runs / "long" / "output" / "metrics.jsonl"
        before = metrics.stat().st_size
        deadline = time.monotonic() + 60
        while metrics.stat().st_size <= before:
            assert time.monotonic() < deadline, "the run has ended with its tab or its board"
            time.sleep(0.1)
        board = BoardProcess(runs, root.parent, board.port)
        with browser(root / "first") as page:  # the cookie still holds
            page.open(board.address)
            page.wait(lambda: page.text("[data-run=long] .badge") == "running", "it is found again")
            page.click("[data-run=long] button")
            page.wait(lambda: page.text("[data-run=long] .badge").startswith("stopped"), "stopped")
            page.open(f"{board.address}/run/long")
            page.wait(lambda: "saved" in page.text("#log"), "its checkpoint")
            last = json.loads(metrics.read_text().splitlines()[-1])["step"]
            page.js("[...document.querySelectorAll('#actions button')].at(-1).click()")
            page.wait(lambda: "resuming after step" in page.text("#log"), "resumed")
            page.wait(lambda: json.loads(metrics.read_text().splitlines()[-1])["step"] > last, "further steps")
            page.js("(window.confirm = () => true)")
            page.click("#actions .danger")
            page.wait(lambda: page.text("#state") == "killed", "killed")
            assert page.problems() == []
    finally:
        board.end()
        for process in runs.glob("*/process.json"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(json.loads(process.read_text())["pid"], signal.SIGKILL)


def served(root: Path, name: str, port: int) -> None:
    """A run that serves a model, as its files tell it; its process is that of the tests."""
    directory = root / "runs" / name
    directory.mkdir()
    facts = {"words": ["server", "run.yaml"], "output": str(directory), "created": time.time()}
    process = {"pid": os.getpid(), "started": job.start_time(os.getpid())}
    for file, content in (("job.json", facts), (job.PROCESS, process)):
        (directory / file).write_text(json.dumps(content))
    (directory / job.LOG).write_text(f"[erniekit] m is served at http://127.0.0.1:{port}/v1\n")
    (directory / "key").write_text(f"key of {name}\n")


class Upstream(BaseHTTPRequestHandler):
    """A model that thinks, calls a tool, and answers when it has the result; to "Wait" only when `go` is set."""

    go = threading.Event()

    def do_GET(self) -> None:
        self._say(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["messages"][-1]["content"] == "Wait":
            self._say(b": nothing yet\n\n")
            self.go.wait(PATIENCE)
            return
        call = {
            "index": 0,
            "id": "c1",
            "type": "function",
            "function": {"name": "price"},
        }
        # As some servers send them: the thought by its older name, and the arguments of a call in pieces.
        more = [{"index": 0, "function": {"arguments": text}} for text in ('{"item": ', '"K37"}')]
        deltas = [{"reasoning": "Let me "}, {"reasoning_content": "look."}]
        deltas += [{"tool_calls": [piece]} for piece in (call, *more)]
        if body["messages"][-1]["role"] == "tool":
            deltas = [{"content": "<b>58</b>"}, {"content": f" yuan, {body['messages'][-1]['content']}"}]
        if self.headers["authorization"]:
            deltas = [{"content": f"{self.headers['authorization']}: {len(body['messages'])}"}]
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        chunks.append({"choices": [], "usage": {"completion_tokens": 5}})
        self._say(b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n")

    def _say(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def test_a_conversation_shows_thoughts_and_calls_and_is_saved(page: Page, board: BoardProcess, root: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page.open(f"{board.address}/chat")
    page.js("document.querySelector('details').open = true")
    page.type("#address", f"http://127.0.0.1:{server.server_address[1]}")
    page.type("#question", "What does K37 cost?\n")
    page.wait(lambda: page.js("!!document.querySelector('.call pre')"), "the call")
    assert page.js("document.querySelector('.thought').textContent") == "Let me look."
    assert not page.js("document.querySelector('.message details').open"), "the thought is folded"
    assert page.text(".call pre") == '{"item": "K37"}'
    page.type(".call input", "58 in stock")
    page.js("document.querySelector('.call + button').click()")
    page.wait(
        lambda: "58 in stock" in page.js("[...document.querySelectorAll('.text')].at(-1).textContent"), "the answer"
    )
    assert page.js("[...document.querySelectorAll('.text')].at(-1).textContent").startswith("<b>58</b>"), "as text"
    page.js("[...document.querySelectorAll('.message button')].at(-1).click()")
    saved = root / "runs" / "saved-samples.jsonl"
    page.wait(saved.exists, "the sample")
    roles = [message["role"] for message in json.loads(saved.read_text("utf-8"))["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    # The base beside its adapter: two runs that serve, each with its own key and its own conversation.
    for name in ("base-x", "serve-x"):
        served(root, name, server.server_address[1])
    page.open(f"{board.address}/chat")
    page.choose("#left", "base-x")
    page.choose("#right", "serve-x")
    for count in (1, 3):
        page.type("#question", "Hello?\n")
        for place, name in enumerate(("base-x", "serve-x")):
            last = (
                f"[...document.querySelectorAll('.pane')][{place}].querySelector('.message:last-child .text').innerText"
            )
            page.wait(lambda: page.js(last) == f"Bearer key of {name}: {count}", name)  # noqa: B023
    assert page.problems() == []
    page.choose("#right", "")
    server.shutdown()
    server.server_close()
    page.type("#question", "Again?\n")
    page.wait(lambda: "does not answer" in page.text("#panes"), "the error")
    problems = page.problems()
    assert len(problems) == 1 and "502" in problems[0]  # Chromium logs the status
    for name in ("base-x", "serve-x"):
        shutil.rmtree(root / "runs" / name)


def test_nothing_that_was_written_is_lost(page: Page, board: BoardProcess, root: Path, workspace: Path):
    """By a reload, another theme, or a message that cannot be sent; a new conversation may begin at any time."""
    run = root / "runs" / "trained"
    run.mkdir()
    facts = {"words": ["train", "run.yaml"], "output": str(run), "created": time.time()}
    (run / "job.json").write_text(json.dumps(facts))
    # A server of this model ends soon: it has no weights.
    text = (workspace / "run.yaml").read_text().replace("continue_training: false\n", "")
    (run / "run.yaml").write_text(text)
    page.open(f"{board.address}/new?command=train&run=trained&copy=1")
    page.wait(lambda: "max_steps: 6" in page.js("$('yaml').value"), "the copy")
    page.type("#yaml", "max_steps: 7\n")
    page.open(page.js("location.href"))
    page.wait(lambda: page.text("#words"), "its check")
    assert page.js("$('yaml').value") == "max_steps: 7\n", "it is not copied again"
    page.open(f"{board.address}/chat")
    page.js("document.querySelector('details').open = true")
    page.type("#question", "Hello?\n")
    page.wait(lambda: page.text("#toasts") == STRINGS["en"]["no_server"], "what is missing")
    page.type("#address", "127.0.0.1:1")
    page.type("#tools", "[")
    page.js("$('ask').requestSubmit()")
    page.wait(lambda: "JSON" in page.text("#toasts"), "what is wrong")
    theme = page.js("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.wait(lambda: page.js("getComputedStyle(document.body).backgroundColor") != theme, "the other theme")
    assert page.js("[$('question').value, $('tools').value]") == ["Hello?", "["]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served(root, "serve-other", server.server_address[1])
    page.open(f"{board.address}/chat?run=trained")
    page.wait(lambda: page.js("$('left').value").startswith("serve-trained"), "the run that was asked for")
    page.choose("#left", "serve-other")
    for question in ("Wait", "Wait", "Hello?"):
        page.type("#question", f"{question}\n")
        page.wait(lambda: not page.find("#send").is_enabled() or question == "Hello?", "it is sent")  # noqa: B023
        page.click("#clear") if question == "Wait" else None
        page.wait(lambda: page.find("#send").is_enabled(), "another may be sent")
    page.wait(lambda: page.text("#panes .text") == "Hello?", "the question")
    page.wait(lambda: "Bearer key of serve-other: 1" in page.text("#panes"), "an answer to one message")
    Upstream.go.set()
    server.shutdown()
    server.server_close()
    assert page.problems() == []
