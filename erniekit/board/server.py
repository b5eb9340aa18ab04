"""`erniekit webui`: a board in the browser to make YAMLs, start and watch runs, look at data, and chat."""

import os
import secrets
from pathlib import Path

from erniekit.board.runs import Runs, short
from erniekit.utils import log, runtime
from erniekit.utils.errors import UserError

try:
    import httpx  # noqa: F401  board.chat needs it
    import uvicorn

    from erniekit.board.app import Board, make_app
    from erniekit.serve.server_access import key_digests, require_key_if_reachable
    from erniekit.serve.server_socket import UVICORN, listen, url_of
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("starlette", "uvicorn", "httpx"):
        raise
    raise UserError(f"`erniekit webui` needs {missing}: pip install 'erniekit[serve]'.") from None

KEY_VARIABLE, KEY_FILE = "ERNIEKIT_API_KEY", ".board-key"


def serve(
    directory: Path = Path("runs"),
    host: str = "127.0.0.1",
    port: int = 7860,
    allow: tuple[Path, ...] = (),
    allowed_hosts: tuple[str, ...] = (),
    api_key_file: str | None = None,
) -> None:
    """Show the board until the process is interrupted; runs continue. Raises ConfigError for a root of runs that
    another board uses, an address that is not free, and one that others reach without a key of the user's own.
    """
    keys = key_digests(api_key_file, runtime.environment_variable(KEY_VARIABLE))
    require_key_if_reachable(host, keys)
    runs = Runs(directory, allow)
    runs.open()
    try:
        with listen(host, port) as listening:
            link = url_of(listening)
            if not keys:
                link += f"/login?key={_own_key(runs.root / KEY_FILE)}"
                keys = key_digests(str(runs.root / KEY_FILE), None)
            board = Board(runs, keys, host, allowed_hosts, f"erniekit-board-{listening.getsockname()[1]}")
            log.info(f"runs are in {short(runs.root)}, and continue when the board ends; it may read and write below:")
            log.info("  " + ", ".join(dict.fromkeys(str(root) for root in runs.roots)))
            log.info(f"board: {link} (Ctrl-C stops it)")
            config = uvicorn.Config(make_app(board), timeout_graceful_shutdown=1, **UVICORN)
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        runs.close()


def _own_key(path: Path) -> str:
    """The key that the board makes for itself, and keeps for its next start; only its user can read the file. Other
    users of this machine reach its loopback address as well, so there is always a key.
    """
    if path.is_file() and path.stat().st_mode & 0o077 == 0:
        return path.read_text(encoding="utf-8").strip()
    path.unlink(missing_ok=True)
    key = secrets.token_urlsafe(24)
    with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600), encoding="utf-8") as file:
        file.write(key + "\n")
    return key
