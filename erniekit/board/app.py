"""The pages of the board, and what they ask for."""

import json
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from erniekit.board import chat, forms
from erniekit.board.access import LOGIN, Cookie, cookie_of, digest_of, with_cookies
from erniekit.board.runs import COMMANDS, NoRun, Runs, cli, offset_of, short
from erniekit.serve.server_access import Gate
from erniekit.serve.server_body import read_body
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_responses import error_response, json_response
from erniekit.utils import log
from erniekit.utils.errors import UserError
from erniekit.utils.growing_files import head
from erniekit.utils.user_files import read_text
from erniekit.utils.version import __version__

_HERE = Path(__file__).parent
_MAX_BYTES = 64 << 20  # of a request: pictures of a conversation
_SECONDS = 300  # that `check` and `plan` may take
_OPEN = (LOGIN, "/static/board.css", "/static/board.js", "/health")
_COOKIE_SECONDS = 30 * 86400
STRINGS = {code: json.loads((_HERE / f"strings/{code}.json").read_text("utf-8")) for code in ("en", "zh")}
KEY_DOCS: dict[str, str] = json.loads((_HERE / "strings/keys_zh.json").read_text("utf-8"))
_PAGES = {"/": "runs", "/new": "new", "/data": "data", "/plan": "plan", "/chat": "chat", "/compare": "run"}
_TITLES = {"eval": "evaluate", "export": "export"}
Body = dict[str, Any]


@dataclass(frozen=True)
class Board:
    """What the pages are about; `cookie` is the name of its cookie."""

    runs: Runs
    keys: tuple[bytes, ...]
    host: str
    allowed_hosts: tuple[str, ...]
    cookie: str


def make_app(board: Board) -> Starlette:
    """The application."""
    actions = (_form, _source, _start, _again, _stop, _plan, _records, _sample)
    routes = [
        *(Route(path, partial(_page, board, name)) for path, name in _PAGES.items()),
        Route("/run/{id}", partial(_page, board, "run")),
        Route(LOGIN, partial(_login, board), methods=["GET", "POST"]),
        Route("/health", _health),
        Route("/api/runs", partial(_list, board)),
        Route("/api/runs/{id}", partial(_poll, board)),
        Route("/api/chat", partial(_chat, board), methods=["POST"]),
        *(Route(f"/api/{act.__name__[1:]}", partial(_act, board, act), methods=["POST"]) for act in actions),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    keys = with_cookies(board.keys)
    gate = Middleware(Gate, board.host, board.allowed_hosts, keys, _OPEN)
    cookie = Middleware(Cookie, board.cookie, not keys)
    handlers: Any = dict.fromkeys((ApiError, UserError, HTTPException, Exception), _refused)
    return Starlette(routes=routes, middleware=[cookie, gate], exception_handlers=handlers)


# Pages


_templates = Environment(loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined)


def _language(request: Request) -> str:
    chosen = request.cookies.get("language", "")
    return chosen if chosen in STRINGS else "zh" if request.headers.get("accept-language", "")[:2] == "zh" else "en"


def _render(request: Request, name: str, status: int = 200, **facts: Any) -> Response:
    language, theme = _language(request), request.cookies.get("theme", "")
    strings = STRINGS[language]
    shown = {"page": name, "t": strings, "title": strings["board"], "language": language, "version": __version__}
    shown |= {"path": request.scope["path"], "theme": theme if theme in ("dark", "light") else ""}
    return HTMLResponse(_templates.get_template(f"{name}.html").render(shown | facts), status)


async def _page(board: Board, name: str, request: Request) -> Response:
    """A page; what changes on it comes by /api."""
    strings = STRINGS[_language(request)]
    facts: Body = {"title": strings.get(name, "")}
    if name == "run":
        ids = request.query_params.get("runs", "").split(",") if "id" not in request.path_params else []
        facts["ids"] = [board.runs.get(each).id for each in ids or [request.path_params["id"]]]
        facts["title"] = " · ".join(facts["ids"])
    if name in ("new", "data", "plan"):
        command = _command(request.query_params.get("command", "train"))
        runs = await run_in_threadpool(board.runs.list)
        facts |= {"command": command, "examples": _examples(), "runs": [run.id for run in runs]}
        if name == "new":
            docs = KEY_DOCS if _language(request) == "zh" else {}
            facts |= {"groups": forms.groups(command, docs), "title": strings[_TITLES.get(command, name)]}
    return _render(request, name, **facts)


def _examples() -> list[str]:
    """Configurations to begin with: the shipped ones, where the working directory is a checkout, and those in it."""
    here = Path.cwd()
    found = [
        *sorted({*here.glob("*.yaml")} - {here / "compose.yaml"}),
        *sorted((here / "examples" / "configs").rglob("*.yaml")),
    ]
    tiny = [path for path in found if "tiny" in path.parts]  # they run on any machine
    return [short(path) for path in (*tiny, *(path for path in found if path not in tiny))]


async def _login(board: Board, request: Request) -> Response:
    """Takes a key, from the link that the board prints or from the page, and sets the cookie."""
    key = request.query_params.get("key")
    if request.method == "POST":
        key = (await read_body(request, 1 << 16)).get("key")
    digest = digest_of(key) if isinstance(key, str) else b""
    if digest not in board.keys:
        return _render(request, "login", 401 if key else 200, wrong=bool(key))
    response = RedirectResponse("/", 303) if request.method == "GET" else json_response({})
    response.set_cookie(board.cookie, cookie_of(digest), _COOKIE_SECONDS, httponly=True, samesite="strict")
    return response


async def _health(request: Request) -> Response:
    return json_response({"status": "ok"})


# What pages ask for


async def _list(board: Board, request: Request) -> Response:
    runs = await run_in_threadpool(lambda: [run.facts() for run in board.runs.list()])
    return json_response({"runs": runs})


async def _poll(board: Board, request: Request) -> Response:
    """What is new about a run since the marks of the last answer; the results and samples that it has written."""
    run, query = board.runs.get(request.path_params["id"]), request.query_params

    def news() -> Body:
        log = run.log(offset_of(query.get("log", "0")))
        written = {"results": head(run.output / "eval_results.json", 100_000), "samples": run.table("samples.jsonl")}
        return {"run": run.facts(), "metrics": run.metrics(query.get("metrics", "")), "log": log, **written}

    return json_response(await run_in_threadpool(news))


async def _act(board: Board, act: Callable[[Board, Body], Any], request: Request) -> Response:
    body = await read_body(request, _MAX_BYTES)
    return json_response(await run_in_threadpool(act, board, body))


def _text(body: Body, name: str, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise ApiError(400, f"{name}: expected text.", name)
    return value


def _asked(board: Board, body: Body) -> tuple[str, Path, tuple[str, ...], tuple[str, ...]]:
    """The run that a request describes: its YAML text, its directory, the arguments after `erniekit`, and those of
    them that override the text.
    """
    directory = board.runs.new_directory(_text(body, "name", "") or "run")
    words = board.runs.words(_command(_text(body, "command", "train")), directory, body.get("own_output") is True)
    return _text(body, "yaml"), directory, words, words[2:] if words[0] != "server" else ()


def _command(command: str) -> str:
    if command not in COMMANDS:
        raise UserError(f"command: expected one of {', '.join(COMMANDS)}")
    return command


def _form(board: Board, body: Body) -> Body:
    """A text after a change (`key`, `value`), its values, and what is wrong with it."""
    text, _, words, overrides = _asked(board, body)
    said: Body = {"yaml": text, "values": None, "words": ["erniekit", *words]}
    try:
        if "key" in body:
            said["yaml"] = text = forms.change(text, _text(body, "key"), _text(body, "value"))
        said["values"] = forms.values(text)
        return said | forms.check(text, words[0], board.runs, overrides)
    except UserError as error:
        return said | {"problems": {"": [str(error)]}, "notes": []}


def _source(board: Board, body: Body) -> Body:
    """The text of an example or of a run; that of a run names its output, so that other commands find it there."""
    if "run" in body:
        run = board.runs.get(_text(body, "run"))
        text = _read(board, run.yaml)
        if body.get("copy") is True:
            return {"yaml": text}
        output = "" if body.get("base") else short(run.output)
        text = forms.change(text, "output_dir", output)
        return {"yaml": forms.change(forms.change(text, "lora_path", ""), "checkpoint", "") if not output else text}
    name = _text(body, "example")
    if name not in _examples():
        raise UserError(f"there is no example {name[:100]!r}")
    return {"yaml": _read(board, Path(name))}


def _read(board: Board, path: Path) -> str:
    """The text of a YAML, links followed only to where the board may read."""
    if not board.runs.is_below(str(path)):
        raise UserError(
            f"{short(path)} is a link to a file that the board may not read. Start it with allow=DIRECTORY."
        )
    try:
        return read_text(path, UserError)
    except FileNotFoundError:
        raise UserError(f"there is no file {short(path)}") from None


def _start(board: Board, body: Body) -> Body:
    """A new run of a text without problems."""
    text, directory, words, overrides = _asked(board, body)
    checked = forms.check(text, words[0], board.runs, overrides)
    if checked["problems"]:
        raise UserError("\n".join(line for lines in checked["problems"].values() for line in lines))
    written = None if overrides else checked["output_dir"]
    output = Path(written) if written else directory / "output"
    return {"id": board.runs.create(directory, text, words, output.absolute()).id}


def _again(board: Board, body: Body) -> Body:
    return board.runs.start(board.runs.get(_text(body, "run"))).facts()


def _stop(board: Board, body: Body) -> Body:
    run = board.runs.get(_text(body, "run"))
    board.runs.stop(run, body.get("force") is True)
    return run.facts()


def _ask(board: Board, text: str, use: str, words: list[str], results: tuple[str, ...]) -> Body:
    """What a command that ends soon prints and writes about a text, which is for the command `use`. `results`: its
    options that name JSON files.
    """
    with forms.draft(text, board.runs) as path:
        forms.require_inside(path, use, board.runs)
        files = {name: path.with_name(f"{name}.json") for name in results}
        whole = [words[0], str(path), *words[1:], *(f"{name}={file}" for name, file in files.items())]
        whole += [f"sheet={path.with_name('sheet.png')}"] * (words[0] == "check")
        try:
            done = subprocess.run(
                cli(*whole), capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"`erniekit {words[0]}` takes more than {_SECONDS} seconds here.") from None
        shown = (done.stdout if done.stdout.strip() else done.stderr).replace(str(path), "the YAML")
        read = {name: json.loads(file.read_text("utf-8")) if file.is_file() else None for name, file in files.items()}
        typed = " ".join(["erniekit", words[0], "x.yaml", *words[1:]])
        return {"code": done.returncode, "text": shown, "words": typed, **read}


def _plan(board: Board, body: Body) -> Body:
    """`erniekit plan` of a text."""
    names = ("gpu", "gpus", "gpus_per_node", "memory", "tokens", "search")
    options = [f"{name}={value}" for name in names if (value := _text(body, name, "").strip())]
    return _ask(board, _text(body, "yaml"), "train", ["plan", *options], ("json",))


def _records(board: Board, body: Body) -> Body:
    """`erniekit check` of a text, with records as the model gets them."""
    count, first = (body.get(name, 1) for name in ("count", "first"))
    if type(count) is not int or type(first) is not int:
        raise ApiError(400, "count, first: expected whole numbers.", "count")
    command = _command(_text(body, "command", "train"))
    words = ["check", f"preview={max(1, min(count, 50))}", f"first={max(1, first)}", f"command={command}"]
    return _ask(board, _text(body, "yaml"), command, words, ("json", "records"))


def _sample(board: Board, body: Body) -> Body:
    messages, tools = body.get("messages"), body.get("tools")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ApiError(400, "messages: expected a list of objects.", "messages")
    path = board.runs.root / "saved-samples.jsonl"
    return {"path": short(path), "count": chat.save_sample(path, messages, tools if isinstance(tools, list) else None)}


async def _chat(board: Board, request: Request) -> Response:
    body = await read_body(request, _MAX_BYTES)
    server, asked = _text(body, "server"), body.get("body")
    if not isinstance(asked, dict):
        raise ApiError(400, "body: expected an object.", "body")
    run = None if ":" in server else board.runs.get(server)
    address, key = await run_in_threadpool(chat.target, server, _text(body, "key", ""), run)
    return await chat.answer(address, key, asked)


async def _refused(request: Request, error: Exception) -> Response:
    """The answer to what goes wrong: JSON to the script, a page to the user."""
    status, message = 404 if isinstance(error, NoRun) else 400, str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, f"{request.scope['path'][:100]}: {error.detail}"
    elif isinstance(error, ApiError):
        return error_response(error)
    elif not isinstance(error, UserError):
        log.warning("".join(traceback.format_exception(error)))
        status, message = 500, "a defect of the board; its log has the details."
    if request.scope["path"].startswith("/api/"):
        return error_response(ApiError(status, message))
    return _render(request, "error", status, message=message)
