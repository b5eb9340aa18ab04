"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters that come and go while a server runs, as vLLM names
them. A training whose rollouts a server generates sends its weights this way (docs/rl-server.md).
"""

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from erniekit.checkpoint.peft_attach import attach_another
from erniekit.lora.several import remove_adapter
from erniekit.serve import server_fields as fields
from erniekit.serve.served_adapters import read_named
from erniekit.serve.server_body import read_body
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_responses import json_response
from erniekit.serve.server_state import Served
from erniekit.utils import log
from erniekit.utils.errors import UserError


async def load_adapter(request: HttpRequest, served: Served) -> Response:
    """Attach an adapter of a directory below lora_directory between two steps of the engine."""
    values = fields.read_fields(await read_body(request, served.max_body_bytes), fields.LOAD_ADAPTER)
    name, chat_model = values["lora_name"], served.chat_model
    if not name:
        raise ApiError(400, "lora_name: expected a name, got an empty text.", "lora_name", "invalid_value")
    directory = _allowed(served, values["lora_path"])
    stored = await served.in_pool(
        lambda: read_named(name, directory, chat_model.model.config, chat_model.path, chat_model.template)
    )

    def attach() -> None:
        if name in (served.name, *served.adapters):
            raise UserError(f"{name!r}: there is a model of this name. Unload it first, or choose another name.")
        attach_another(chat_model.model, name, stored)

    await _between_steps(served, attach)
    log.info(f"adapter {name}: loaded from {directory}")
    return json_response({"status": "loaded", "lora_name": name})


async def unload_adapter(request: HttpRequest, served: Served) -> Response:
    """Forget an adapter that no answer uses."""
    values = fields.read_fields(await read_body(request, served.max_body_bytes), fields.UNLOAD_ADAPTER)
    _lora_directory(served)
    name = values["lora_name"]

    def detach() -> None:
        if name not in served.adapters:  # another request may have unloaded it while this one waited for the step
            raise ApiError(404, f"lora_name: there is no adapter {name[:80]!r}.", "lora_name", "model_not_found")
        served.thread.engine.forget_adapter(name)
        remove_adapter(served.chat_model.model, name)

    await _between_steps(served, detach)
    log.info(f"adapter {name}: unloaded")
    return json_response({"status": "unloaded", "lora_name": name})


async def _between_steps(served: Served, change: Callable[[], None]) -> None:
    """Change the model in the engine's thread. Raises ApiError."""
    try:
        await served.thread.run(change)
    except UserError as error:
        raise ApiError(400, f"lora_name: {error}", "lora_name", "invalid_value") from None


def _lora_directory(served: Served) -> Path:
    """The directory below which adapters may be. Raises ApiError where the server's YAML names none."""
    if served.cfg.lora_directory is None:
        raise ApiError(
            403, "adapters come and go only where the server's YAML has lora_directory.", code="adapters_are_fixed"
        )
    return Path(served.cfg.lora_directory).resolve()


def _allowed(served: Served, path: str) -> Path:
    """The directory of an adapter, links followed, which has to be below lora_directory. Raises ApiError."""
    allowed = _lora_directory(served)
    try:
        directory = Path(path).expanduser().resolve()
        is_there = directory.is_dir()
    except (OSError, ValueError, RuntimeError):  # no path
        raise ApiError(404, "lora_path: there is no such directory.", "lora_path", "not_found") from None
    if not directory.is_relative_to(allowed):
        raise ApiError(403, f"lora_path: it is not below lora_directory ({allowed}).", "lora_path", "path_not_allowed")
    if not is_there:
        raise ApiError(404, "lora_path: there is no such directory.", "lora_path", "not_found")
    return directory
