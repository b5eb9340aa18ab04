"""`erniekit server`: answers OpenAI's clients over HTTP with the model that a YAML names.

One process, one port. It is for checking and using a model beside its training, on one machine.
"""

import asyncio
import socket

from erniekit.config import Config
from erniekit.generation.load import ChatModel
from erniekit.generation.prompt_scores import score_prompt
from erniekit.serve.served_adapters import open_with_adapters
from erniekit.serve.served_model import context_of, engine_of, name_of
from erniekit.utils import log, runtime
from erniekit.utils.errors import CheckpointError, UserError
from erniekit.utils.wording import count_of

try:
    import uvicorn

    from erniekit.serve.server_access import key_digests, require_key_if_reachable
    from erniekit.serve.server_app import make_app
    from erniekit.serve.server_engine import EngineThread
    from erniekit.serve.server_metrics import Metrics
    from erniekit.serve.server_socket import UVICORN, listen, url_of
    from erniekit.serve.server_state import Served
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("starlette", "uvicorn", "prometheus_client"):
        raise
    raise UserError(f"`erniekit server` needs {missing}: pip install 'erniekit[serve]'.") from None

KEY_VARIABLE = "ERNIEKIT_API_KEY"
GRACE = 3  # seconds


def serve(cfg: Config) -> None:
    """Serve the model that `cfg` names (see generation.load.find_model) until the process is interrupted.

    Raises UserError, before a weight is read, for an address that is not free, one that others reach without a key, and
    for a model that cannot be loaded.
    """
    keys = key_digests(cfg.api_key_file, runtime.environment_variable(KEY_VARIABLE))
    require_key_if_reachable(cfg.host, keys)
    listening = listen(cfg.host, cfg.port)
    try:
        served = prepare(cfg, open_with_adapters(cfg), keys)
        _say(served, listening)
        HttpServer(served).run(sockets=[listening])
    finally:
        listening.close()


def prepare(cfg: Config, chat_model: ChatModel, keys: tuple[bytes, ...] = ()) -> "Served":
    """What the application needs to serve a model. Raises ConfigError for a max_model_len that the model has not, and
    CheckpointError for weights with which every request would fail, while /health would say that all is well.
    """
    context = context_of(cfg, chat_model.model.config)
    try:
        score_prompt(chat_model.model, 2 * chat_model.tokenizer.encode("1"), 0)
    except CheckpointError as error:
        raise CheckpointError(f"{chat_model.path}: {error}") from None
    thread = EngineThread(engine_of(cfg, chat_model), cfg.max_waiting_requests)
    name = name_of(cfg, chat_model.path)
    return Served(cfg, chat_model, context, chat_model.limits(cfg), name, thread, Metrics(thread, name), keys)


class HttpServer(uvicorn.Server):
    """Serves a model over HTTP. On Ctrl-C or SIGTERM, answers have GRACE seconds; those that have not ended by then get
    an error, so that their clients learn why.
    """

    def __init__(self, served: "Served") -> None:
        super().__init__(uvicorn.Config(make_app(served), timeout_graceful_shutdown=GRACE + 3, **UVICORN))
        self._thread = served.thread

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        asyncio.get_running_loop().call_later(GRACE, self._thread.end)
        await super().shutdown(sockets)


def _say(served: "Served", listening: socket.socket) -> None:
    cfg = served.cfg
    engine = served.thread.engine
    most = "what is left of the context"
    if "max_new_tokens" in cfg.given:
        most = str(cfg.max_new_tokens)
    log.info(
        f"requests that do not say otherwise: temperature {cfg.temperature:g}, top_p {cfg.top_p:g}, top_k {cfg.top_k}, "
        f"max_tokens {most} (the YAML's, or the defaults of `erniekit chat`)"
    )
    log.info(
        f"up to {count_of(engine.max_running, 'answer')} at a time, {cfg.max_waiting_requests} may wait; keys and "
        f"values of up to {engine.max_running} + {engine.num_kept} conversations of {served.context} tokens are kept"
    )
    keyless = "" if served.keys else ", no key is asked for"
    log.info(f"{served.name} is served at {url_of(listening)}/v1 (Ctrl-C stops it{keyless})")
