"""The user's own tools, `path.py:name`: described by their signature and docstring, and run in a process that is killed
when a call takes too long.
"""

import importlib.util
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from erniekit.tools.result import BadCall
from erniekit.utils import runtime, stop_signals
from erniekit.utils.errors import ConfigError

_START_SECONDS = 120.0  # for importing the user's file
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class UserTools:
    """The user's functions by their names. `written`: path.py:name of each, relative to `base`.

    Raises ConfigError for a file that cannot be imported and for a function that cannot be described.
    """

    def __init__(self, written: list[str], base: Path, timeout: float) -> None:
        self._written, self._base, self._timeout = written, base, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self.descriptions: list[dict[str, Any]] = []
        if written:
            self.descriptions = self._start()

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        """The text that a function returns; another value as JSON. Raises BadCall for what it raises, and if it takes
        too long.
        """
        if self._process is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((name, arguments))
            if not self._connection.poll(self._timeout):
                self.close()
                raise BadCall(f"{name} took more than {self._timeout:g} s and was stopped")
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise BadCall(f"the process of {name} ended") from None
        if kind == "error":
            raise BadCall(f"{name} failed: {content}")
        return content

    def close(self) -> None:
        """Kill the process, with those that it started. The next call starts another."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        assert self._connection is not None
        self._connection.close()
        self._process = self._connection = None

    def _start(self) -> list[dict[str, Any]]:
        ours, theirs = socket.socketpair()
        with theirs:
            command = runtime.python_command(
                "from erniekit.tools.user_tool import serve; serve(int(sys.argv[1]), int(sys.argv[2]))",
                str(theirs.fileno()),
                str(os.getpid()),
            )
            with stop_signals.blocked():
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
                )
        self._connection = Connection(ours.detach())
        kind = "error"
        content: Any = f"the functions were not imported within {_START_SECONDS:g} seconds"
        try:
            self._connection.send((self._written, self._base))
            if self._connection.poll(_START_SECONDS):
                kind, content = self._connection.recv()
        except (EOFError, OSError):
            content = "the process that imports the functions ended"
        if kind == "error":
            self.close()
            raise ConfigError(f"tools: {content}")
        return content


def serve(descriptor: int, parent: int) -> None:
    """The main function of the process: imports the functions, sends their descriptions, then answers calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the trainer
    runtime.end_with_parent(parent)
    connection = Connection(descriptor)
    sys.stdout = sys.stderr
    try:
        written, base = connection.recv()
        try:
            functions = {text.rpartition(":")[2]: _load(base / text.rpartition(":")[0], text) for text in written}
            connection.send(("ready", [described(name, function) for name, function in functions.items()]))
        except BaseException as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))
            return
        while True:
            name, arguments = connection.recv()
            try:
                value = functions[name](**arguments)
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                connection.send(("text", text))
            except BaseException as error:  # also SystemExit
                connection.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent has closed its end


def described(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The description of a function for the model: its docstring's first paragraph, and its parameters with their types
    and what "Args:" says of them. Raises ValueError without a docstring, or for a parameter without a type.
    """
    documentation = inspect.getdoc(function)
    if not documentation:
        raise ValueError(f"{name} has no docstring; the model reads there what the tool does")
    summary = documentation.split("\n\n")[0].replace("\n", " ").strip()
    hints, properties, required = typing.get_type_hints(function), {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{name} has the parameter {parameter}, which a call cannot pass by name")
        if parameter.name not in hints:
            raise ValueError(f"the parameter {parameter.name} of {name} has no type: str, int, float, bool, list, dict")
        properties[parameter.name] = _schema(hints[parameter.name])
        if found := re.search(rf"^\s*{parameter.name}(?: \(.*?\))?: (.+)$", documentation, re.MULTILINE):
            properties[parameter.name]["description"] = found[1].strip()
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": parameters}}


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type; of a union that of its first type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _schema(typing.get_args(hint)[0])
    kind = typing.get_origin(hint) or hint
    schema: dict[str, Any] = {"type": _TYPES.get(kind, "string")}
    if kind is list and typing.get_args(hint):
        schema["items"] = _schema(typing.get_args(hint)[0])
    return schema


def _load(path: Path, written: str) -> Callable[..., Any]:
    if not path.is_file():
        raise ValueError(f"{written}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"tool_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = vars(module).get(written.rpartition(":")[2])
    if not callable(function):
        raise ValueError(f"{written}: there is no such function in {path}")
    return function
