"""An `erniekit server` in a thread of this process, reached over loopback."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erniekit import config
from erniekit.serve.served_adapters import open_with_adapters
from erniekit.serve.server import HttpServer, prepare
from erniekit.serve.server_access import key_digests
from erniekit.serve.server_socket import listen

KEY = "a-secret-key-of-the-server"


@contextmanager
def serving(model: Path, **keys: Any) -> Iterator[str]:
    """The base URL of an `erniekit server` in a thread, which asks for KEY."""
    values = {"model_name_or_path": str(model), "compute_type": "fp32", "temperature": 0.5, "top_p": 0.5}
    cfg = config.load(None, values | keys, "server")
    listening = listen("127.0.0.1", 0)
    server = HttpServer(prepare(cfg, open_with_adapters(cfg), key_digests(None, KEY)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
