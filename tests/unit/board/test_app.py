"""The pages of the board over HTTP: who may ask, what is refused, and that nothing is shown that could run."""

import ast
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from starlette.testclient import TestClient
from support.source_tree import REPOSITORY

from erniekit.board import server as board_server
from erniekit.board.app import KEY_DOCS, STRINGS, Board, make_app
from erniekit.board.runs import Runs
from erniekit.board.server import serve
from erniekit.cli import main as cli
from erniekit.config.schema import GROUPS, fields
from erniekit.serve.server_access import key_digests
from erniekit.utils.errors import ConfigError, UserError

BOARD = REPOSITORY / "erniekit" / "board"
KEY = "secret-of-the-test"
PAGES = ("/", "/new?command=train", "/new?command=eval", "/new?command=export", "/new?command=server", "/data", "/plan")
ADDRESS = "http://127.0.0.1:7860"
EXAMPLE = "examples/configs/tiny/sft/run_sft_dense.yaml"


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    """Where the runs are; the working directory is the checkout, whose examples are shown."""
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def board(root: Path) -> Board:
    return Board(Runs(root), key_digests(None, KEY), "127.0.0.1", (), "erniekit-board-7860")


@pytest.fixture
def page(board: Board) -> Iterator[TestClient]:
    """A browser that is logged in."""
    with client(board) as browser:
        assert browser.get("/login", params={"key": KEY}).status_code == 200
        yield browser


def client(board: Board) -> TestClient:
    return TestClient(make_app(board), base_url=ADDRESS, raise_server_exceptions=False)


def error(answer) -> str:
    assert answer.status_code >= 400, answer.text
    return answer.json()["error"]["message"]


# Pages


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_is_there_in_both_languages(page: TestClient, language: str):
    page.cookies.set("language", language)
    strings = STRINGS[language]
    for path, title in zip(PAGES, ("runs", "new", "evaluate", "export", "new", "data", "plan"), strict=True):
        answer = page.get(path)
        assert answer.status_code == 200 and f"<h1>{strings[title]}" in answer.text, path
        assert f'lang="{"zh-CN" if language == "zh" else "en"}"' in answer.text
        assert "built-in method" not in answer.text, "a word of jinja's dict is no string"
    assert strings["chat"] in page.get("/chat").text and strings["login"] in page.get("/login").text


def test_the_language_is_the_browsers_until_one_is_chosen(page: TestClient):
    assert 'lang="zh-CN"' in page.get("/", headers={"accept-language": "zh-CN,zh;q=0.9"}).text
    page.cookies.set("language", "en")
    assert 'lang="en"' in page.get("/", headers={"accept-language": "zh-CN"}).text
    page.cookies.set("language", "<script>")
    assert 'lang="en"' in page.get("/").text


def test_both_languages_have_the_same_strings_and_all_are_used():
    groups = {f"group: {name}" for name in (*GROUPS, "others")}  # in English they are the schema's own words
    assert STRINGS["en"].keys() | groups == STRINGS["zh"].keys()
    assert all(
        re.findall(r"\{\d}", STRINGS["en"][name]) == re.findall(r"\{\d}", STRINGS["zh"][name]) for name in STRINGS["en"]
    )
    templates = "".join(path.read_text("utf-8") for path in (BOARD / "templates").glob("*.html"))
    script = (BOARD / "static" / "board.js").read_text("utf-8")
    used = set(re.findall(r"\bt\.(\w+)\b(?!\()", templates)) | set(re.findall(r"\bT\.(\w+)|say\(\"(\w+)\"", script))
    names = {name for each in used for name in ([each] if isinstance(each, str) else each) if name}
    states = {"running", "done", "failed", "stopped", "killed", "other"}
    assert names | states | {"new", "runs", "data", "plan", "chat"} == STRINGS["en"].keys()
    assert not names & set(dir(dict)), "jinja would find the method"


def test_the_documentation_of_keys_in_chinese_is_of_keys_that_there_are():
    """A key without a translation is shown in English."""
    assert KEY_DOCS.keys() <= fields().keys()
    assert all(re.search(r"[\u4e00-\u9fff]", text) and text.endswith("。") for text in KEY_DOCS.values())


def test_vendored_files_are_those_that_were_published():
    """uPlot 1.6.32 from npm: dist/uPlot.iife.min.js, dist/uPlot.min.css, LICENSE."""
    digests = {name: hashlib.sha256((BOARD / "static" / name).read_bytes()).hexdigest()[:16] for name in VENDORED}
    assert digests == VENDORED


VENDORED = {"uPlot.js": "19c8d4c6ad88929a", "uPlot.css": "df630c6a8d6f8eea", "uPlot.LICENSE": "8f989229699b4fe2"}


def test_the_board_stays_small():
    """Lines of code in Python, templates, script, style sheet and strings, without blank lines, comments and
    docstrings, as cloc counts; uPlot is not ours, and the keys' documentation in Chinese is a table of the schema's.
    """
    files = [path for path in BOARD.rglob("*") if path.suffix in (".py", ".html", ".js", ".css", ".json")]
    texts = {path: path.read_text("utf-8") for path in files if path.name not in (*VENDORED, "keys_zh.json")}
    assert sum(code_lines(path, text) for path, text in texts.items()) < 1500
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 120


def code_lines(path: Path, text: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    if path.suffix == ".py":
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [
            node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)
        ]
        left_out = {number for doc in docs for number in range(doc.lineno, doc.end_lineno + 1)}
        text = "\n".join(line for number, line in enumerate(text.splitlines(), 1) if number not in left_out)
    comments = {".py": ("#",), ".js": ("//", "/**", "*")}.get(path.suffix, ())
    return sum(bool(line.strip()) and not line.strip().startswith(comments or "\0") for line in text.splitlines())


def test_nothing_in_the_board_starts_a_shell_or_writes_html():
    python = "".join(path.read_text("utf-8") for path in BOARD.glob("*.py"))
    assert not re.search(r"shell=True|os\.system|create_subprocess_shell|\|safe|Markup", python)
    script = (BOARD / "static" / "board.js").read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    templates = "".join(path.read_text("utf-8") for path in (BOARD / "templates").glob("*.html"))
    assert not re.search(r"\|\s*safe|autoescape false|https?://|\son\w+=|style=", templates)


# Who may ask


def test_without_a_key_there_is_only_the_login(board: Board):
    browser = client(board)
    for path in (*PAGES, "/chat", "/run/x", "/compare?runs=a,b"):
        answer = browser.get(path, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
    for path in ("/api/runs", "/api/runs/x", "/static/uPlot.js"):
        assert browser.get(path).status_code == 401, path
    for path in ("form", "source", "start", "again", "stop", "plan", "records", "sample", "chat"):
        assert browser.post(f"/api/{path}", json={}).status_code == 401, path
    for path in ("/login", "/static/board.css", "/static/board.js", "/health"):
        assert browser.get(path).status_code == 200, path
    for key in ("wrong", "", "ü\ud800".encode("utf-8", "surrogatepass").decode("latin1")):
        assert browser.get("/login", params={"key": key}, follow_redirects=False).status_code in (200, 401)
        assert not browser.cookies
    assert browser.post("/login", json={"key": "wrong"}).status_code == 401
    assert browser.post("/login", json={"key": [KEY]}).status_code in (200, 401) and not browser.cookies
    assert browser.post("/login", json={"key": KEY}).status_code == 200
    assert browser.get("/api/runs").json() == {"runs": []}


def test_the_cookie_is_for_this_board_alone_and_is_not_the_key(board: Board):
    answer = client(board).get("/login", params={"key": KEY}, follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert answer.headers["location"] == "/", "the key leaves the address"
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and cookie.startswith("erniekit-board-7860=")
    assert KEY not in cookie and hashlib.sha256(KEY.encode()).hexdigest() not in cookie
    other = Board(board.runs, key_digests(None, "another-key"), "127.0.0.1", (), "erniekit-board-7860")
    with client(other) as browser:
        browser.cookies.set("erniekit-board-7860", cookie.partition("=")[2].partition(";")[0])
        assert browser.get("/api/runs").status_code == 401


def test_other_sites_and_other_names_are_refused(page: TestClient):
    assert page.get("/", headers={"host": "evil.example"}).status_code == 403
    assert page.get("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403
    body = {"run": "x"}
    for headers in (
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        assert page.post("/api/stop", json=body, headers=headers).status_code == 403, headers
    assert "there is no run" in error(page.post("/api/stop", json=body, headers={"origin": ADDRESS}))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert "application/json" in error(
            page.post("/api/stop", content=b'{"run":"x"}', headers={"content-type": kind})
        )
    for path in ("form", "source", "start", "again", "stop", "plan", "records", "sample", "chat"):
        assert page.get(f"/api/{path}").status_code == 405, "nothing is done by GET"


def test_pages_cannot_be_framed_or_load_from_elsewhere(page: TestClient):
    for path in ("/", "/api/runs", "/static/board.js", "/nowhere", "/run/none"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy, path
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_paths_stay_below_what_is_served(page: TestClient, root: Path):
    (root.parent / "secret.yaml").write_text("seed: 1\n")
    for name in ("../secret.yaml", "/etc/passwd", str(root.parent / "secret.yaml"), "examples/configs/../../README.md"):
        assert "there is no example" in error(page.post("/api/source", json={"example": name}))
    for name in ("..", "../..", "a/../../x", "%2e%2e"):
        assert "there is no run" in error(page.post("/api/source", json={"run": name}))
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/run/..%2f..%2fetc",
        "/api/runs/%2e%2e",
    ):
        assert page.get(path).status_code in (400, 404), path


def test_what_users_and_files_say_is_escaped(page: TestClient, root: Path):
    evil = "<script>alert(1)</script>"
    for path in (f"/run/{evil}", f"/compare?runs={evil}", f"/new?command={evil}"):
        answer = page.get(path)
        assert answer.status_code in (400, 404) and evil not in answer.text, path
    directory = root / "by-hand"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, evil: 1}) + "\n")
    answer = page.get("/api/runs/by-hand")
    assert answer.headers["content-type"] == "application/json" and evil in answer.json()["metrics"]["records"][0]
    assert page.get("/run/by-hand").status_code == 200


# What pages ask for


def text_of(page: TestClient) -> str:
    return page.post("/api/source", json={"example": EXAMPLE}).json()["yaml"]


def test_the_form_follows_the_text_and_changes_it(page: TestClient):
    text = text_of(page)
    asked = {"yaml": text, "command": "train", "name": "my-run", "own_output": True}
    said = page.post("/api/form", json=asked).json()
    assert said["problems"] == {} and said["yaml"] == text and said["values"]["max_seq_len"] == "256"
    assert said["words"][:2] == ["erniekit", "train"] and said["words"][3].endswith("runs/my-run/output")
    said = page.post("/api/form", json=asked | {"key": "max_steps", "value": "many"}).json()
    assert "expected an integer" in said["problems"]["max_steps"][0] and "max_steps: many" in said["yaml"]
    said = page.post("/api/form", json=asked | {"yaml": "a: ["}).json()
    assert said["values"] is None and "not YAML" in said["problems"][""][0]
    assert "expected letters" in error(page.post("/api/form", json=asked | {"name": "../x"}))
    assert "command" in error(page.post("/api/form", json=asked | {"command": "chat; rm"}))
    assert "yaml: expected text" in error(page.post("/api/form", json={"yaml": 1}))


def test_what_would_not_run_is_not_started(page: TestClient, root: Path):
    text = text_of(page)
    bad = page.post("/api/start", json={"yaml": f"{text}lora_rank: none\nfoo: 1\n", "command": "train", "name": "a"})
    assert "foo: unknown key" in error(bad)
    outside = {"yaml": f"{text}logging_dir: /etc\nreport_to: visualdl\n", "command": "train", "name": "a"}
    assert "allow=DIRECTORY" in error(page.post("/api/start", json=outside))
    for name in ("again", "stop"):
        assert "there is no run" in error(page.post(f"/api/{name}", json={"run": "a"}))
    assert not list(root.glob("a*"))


def test_a_run_is_started_watched_and_used_by_the_next_command(page: TestClient, monkeypatch):
    monkeypatch.setattr("erniekit.board.runs.cli", lambda *words: ("sh", "-c", 'echo "$@" >&2; exit 3', "sh", *words))
    text = text_of(page)
    identity = page.post("/api/start", json={"yaml": text, "command": "train", "name": "a", "own_output": True}).json()[
        "id"
    ]
    deadline = time.monotonic() + 20
    while (said := page.get(f"/api/runs/{identity}").json())["run"]["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert said["run"]["state"] == "failed" and said["run"]["code"] == 3
    words = said["run"]["words"].split()
    assert words[1] == "train" and words[3].startswith("output_dir=") and " ".join(words[1:]) in said["log"]["text"]
    output = words[3].removeprefix("output_dir=")
    used = page.post("/api/source", json={"run": identity}).json()["yaml"]
    assert f"output_dir: {output}" in used and "./demo_output" not in used.partition("### data")[2]
    assert page.post("/api/source", json={"run": identity, "copy": True}).json()["yaml"] == text
    assert (
        "output_dir"
        not in page.post("/api/source", json={"run": identity, "base": True}).json()["yaml"].partition("###")[2]
    )
    assert (
        page.get(f"/run/{identity}").status_code == 200
        and page.get(f"/compare?runs={identity},{identity}").status_code == 200
    )
    Path(output).mkdir()
    Path(output, "samples.jsonl").write_text('{"prompt": "1+1", "reward": 0.5}\nbroken\n')
    said = page.get(f"/api/runs/{identity}", params={"log": said["log"]["offset"]}).json()
    assert said["samples"] == [{"prompt": "1+1", "reward": 0.5}] and said["log"]["text"] == ""
    served = page.post("/api/start", json={"yaml": used, "command": "server", "name": "s"}).json()["id"]
    words = page.get(f"/api/runs/{served}").json()["run"]["words"].split()
    assert words[3:5] == ["host=127.0.0.1", "port=0"]
    key = Path(words[5].removeprefix("api_key_file="))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_text()) > 20


def test_a_run_is_looked_for_where_its_yaml_says_after_references(page: TestClient, root: Path, monkeypatch):
    monkeypatch.setattr("erniekit.board.runs.cli", lambda *words: ("true",))
    named = f"output_dir: {root}/${{run_name}}\nrun_name: by-name"
    asked = {"yaml": text_of(page).replace("output_dir: ./demo_output/dense", named), "command": "train", "name": "a"}
    identity = page.post("/api/start", json=asked).json()["id"]
    (root / "by-name").mkdir()
    (root / "by-name" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert page.get(f"/api/runs/{identity}").json()["metrics"]["records"] == [{"step": 1, "loss": 2.0}]
    asked["yaml"] += "logging_dir: ${HOME}\n"
    assert "environment" in page.post("/api/form", json=asked).json()["problems"][""][0]
    assert "environment" in error(page.post("/api/start", json=asked))


def test_a_source_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch):
    work = tmp_path / "work"
    (work / "directory.yaml").mkdir(parents=True)
    monkeypatch.chdir(work)
    (work / "gbk.yaml").write_bytes("seed: 1  # 中文\n".encode("gbk"))
    (tmp_path / "elsewhere.yaml").write_text("seed: 1\n")
    (work / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    (work / "nowhere.yaml").symlink_to(work / "missing")
    run = work / "runs" / "by-hand"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    said = {"gbk": "not UTF-8", "directory": "a directory", "nowhere": "there is no file", "link": "allow=DIRECTORY"}
    with client(Board(Runs(work / "runs"), (), "127.0.0.1", (), "board")) as page:
        for name, reason in said.items():
            assert reason in error(page.post("/api/source", json={"example": f"{name}.yaml"})), name
        assert "there is no file runs/by-hand/config.yaml" in error(page.post("/api/source", json={"run": "by-hand"}))
        shutil.rmtree(work / "runs")
        assert "not there any more" in error(page.get("/api/runs"))


def test_data_and_plan_are_those_of_the_commands(page: TestClient):
    text = text_of(page)
    said = page.post("/api/records", json={"yaml": text, "first": 3, "count": 2}).json()
    assert said["code"] == 0, said["text"]
    train = [record for record in said["records"] if record["split"] == "train"]
    assert [record["where"] for record in train] == ["data/demo/train.jsonl:3", "data/demo/train.jsonl:4"]
    (document,) = train[0]["documents"]
    assert sum(times for _, _, times in document["tokens"]) == 56
    assert sum(trained for _, trained, _ in document["tokens"]) == 15 and "15 of them trained" in document["sizes"]
    assert document["tokens"][-1] == ["</s>", 1, 1]
    said = page.post("/api/plan", json={"yaml": text, "gpu": "H100"}).json()
    assert said["code"] == 0 and said["json"]["fits"] and said["json"]["gpu"] == "H100"
    assert said["words"] == "erniekit plan x.yaml gpu=H100" and "FITS" in said["text"]
    said = page.post("/api/plan", json={"yaml": text, "gpu": "H1000"}).json()
    assert said["code"] == 1 and said["json"] is None and "H1000" in said["text"]
    assert "whole numbers" in error(page.post("/api/records", json={"yaml": text, "first": "1"}))


def test_data_and_plan_read_only_where_the_board_may(page: TestClient, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy("data/demo/test.jsonl", elsewhere / "secret.jsonl")
    for command in ("train", "eval"):
        text = text_of(page).replace("./data/demo/test.jsonl", str(elsewhere / "secret.jsonl"))
        said = error(page.post("/api/records", json={"yaml": text, "command": command}))
        assert "eval_dataset_path" in said and "allow=DIRECTORY" in said
    assert "allow=DIRECTORY" in error(page.post("/api/plan", json={"yaml": text}))


# Chat


class Upstream(BaseHTTPRequestHandler):
    """A server of OpenAI's interface that keeps what it was asked, and streams two pieces."""

    asked: ClassVar[list[tuple[str, str | None, dict]]] = []

    def do_GET(self) -> None:
        self._say(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, self.headers["authorization"], body))
        self._say(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def _say(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Upstream.asked.clear()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_a_conversation_is_passed_on_with_the_servers_name_of_its_model(page: TestClient, upstream: int):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    asked = {"server": f"http://127.0.0.1:{upstream}", "key": "k", "body": body}
    answer = page.post("/api/chat", json=asked)
    assert answer.text == 'data: {"choices": []}\n\ndata: [DONE]\n\n'
    assert Upstream.asked == [("/v1/chat/completions", "Bearer k", {"model": "m"} | body)]


@pytest.mark.parametrize(
    "server",
    ["http://example.com:80", "http://169.254.169.254:80/", "file:///etc/passwd", "http://127.0.0.1", "https://127.0.0.1:1",
     "http://127.0.0.1:1@example.com:80", "http://127.0.0.1.example.com:80", "http://[::1", "http://0x7f.1:99999/"],
)  # fmt: skip
def test_a_conversation_goes_to_this_machine_alone(page: TestClient, server: str):
    assert "an address of this machine" in error(page.post("/api/chat", json={"server": server, "body": {}}))


def test_a_server_that_is_not_there_is_an_error(page: TestClient):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "does not answer" in error(page.post("/api/chat", json={"server": f"http://127.0.0.1:{port}", "body": {}}))
    assert "there is no run" in error(page.post("/api/chat", json={"server": "x", "body": {}}))


def test_a_conversation_is_saved_as_a_sample_that_the_training_reads(page: TestClient, root: Path):
    call = {"id": "1", "type": "function", "function": {"name": "price", "arguments": '{"item": "K37"}'}}
    tools = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": "What does K37 cost?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "58"},
                {"role": "assistant", "content": "58 yuan", "reasoning_content": "It is 58."}]  # fmt: skip
    said = page.post("/api/sample", json={"messages": messages, "tools": tools}).json()
    assert said["count"] == 1 and page.post("/api/sample", json={"messages": messages}).json()["count"] == 2
    from erniekit.data.records.formats import FORMATS

    lines = (root / "saved-samples.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0]) == {"messages": messages, "tools": tools} and "messages" in FORMATS
    assert "ends with an answer" in error(page.post("/api/sample", json={"messages": messages[:1]}))
    assert "list of objects" in error(page.post("/api/sample", json={"messages": ["a"]}))


# Starting


def test_the_key_is_made_once_and_only_its_user_reads_it(tmp_path: Path):
    path = tmp_path / ".board-key"
    key = board_server._own_key(path)
    assert board_server._own_key(path) == key and stat.S_IMODE(path.stat().st_mode) == 0o600 and len(key) >= 32
    os.chmod(path, 0o644)
    assert board_server._own_key(path) != key, "others could have read it"


def test_a_board_that_cannot_start_says_what_to_do(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERNIEKIT_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="other machines reach this address"):
        serve(host="0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"Address already in use\. Choose another"):
            serve(port=taken.getsockname()[1])
    again = Runs(tmp_path / "runs")
    again.open()  # the root was released
    again.close()
    (tmp_path / "file").write_text("")
    for words, said in {
        ("port=99999",): "expected a port",
        ("allow=nowhere",): "directories that exist",
        ("x.yaml",): "x.yaml: the options are runs, host",
        ("runs=file",): "not a directory",
        ("api_key_file=none",): "there is no file 'none'",
    }.items():
        assert cli.main(["webui", *words]) == cli.EXIT_USER_ERROR, words
        assert said in capsys.readouterr().err, words
    assert issubclass(ConfigError, UserError)
