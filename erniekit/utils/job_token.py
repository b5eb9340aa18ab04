"""The token of a job: a secret shared by its processes (erniekit.utils.handshake compares it)."""

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from erniekit.utils import log, user_files
from erniekit.utils.errors import ConfigError

VARIABLE, FILE_VARIABLE = "ERNIEKIT_JOB_TOKEN", "ERNIEKIT_JOB_TOKEN_FILE"
_SHORTEST = 16
_MAKE = "head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \\n'"


def new() -> str:
    """A new random token."""
    return secrets.token_hex(32)


def find(environ: Mapping[str, str], cache: Path | None) -> str:
    """The token that the environment defines for a job on several hosts.

    Args:
        environ: where ERNIEKIT_JOB_TOKEN or ERNIEKIT_JOB_TOKEN_FILE may be.
        cache: a directory of this user, if all processes run on this machine, as when two hosts are rehearsed on
            127.0.0.1; without a token in the environment they share one that is kept there. Else None.

    Raises:
        ConfigError: there is none, or it is too short; the message has a command that makes one.
    """
    text = environ.get(VARIABLE, "").strip()
    if text:
        return _checked(text, VARIABLE)
    path = environ.get(FILE_VARIABLE, "").strip()
    if path:
        return _read(Path(path).expanduser())
    if cache is not None:
        return _of_this_user(cache / "job-token")
    raise ConfigError(
        f"{VARIABLE} is not set. A job on several hosts needs a token, the same on every host, so that strangers on "
        "the network cannot take part. Make one once, in a directory that all hosts share, and name it on every host:\n"
        f"  (umask 077; {_MAKE} > job-token)\n"
        f"  export {FILE_VARIABLE}=$PWD/job-token"
    )


def _checked(text: str, source: str) -> str:
    if len(text) < _SHORTEST:
        raise ConfigError(
            f"{source}: a token of {len(text)} characters can be guessed; at least {_SHORTEST}. Make one: {_MAKE}"
        )
    return text


def _read(path: Path) -> str:
    try:
        text = user_files.read_text(path, ConfigError).strip()
    except FileNotFoundError:
        raise ConfigError(f"{FILE_VARIABLE}={path}: no such file. Make one: (umask 077; {_MAKE} > {path})") from None
    if path.stat().st_mode & stat.S_IROTH:
        log.warning(f"{FILE_VARIABLE}: every user of this machine can read {path}; chmod 600 keeps it to you")
    return _checked(text, f"{FILE_VARIABLE}={path}")


def _of_this_user(path: Path) -> str:
    """A token in a file that only this user can read; the first process that needs it makes it."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            candidate = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                descriptor = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "w", encoding="ascii") as file:
                    file.write(new())
                with contextlib.suppress(FileExistsError):
                    # a link, unlike a rename, does not replace a token that another process made first
                    os.link(candidate, path)
            finally:
                candidate.unlink(missing_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(f"{path}: others may have read it. Delete it; a new one is made.")
        return _checked(path.read_text(encoding="ascii").strip(), str(path))
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{path}: the token of jobs on this machine cannot be kept there ({error}). Set {VARIABLE}, the same for "
            f"all processes: export {VARIABLE}=$({_MAKE})"
        ) from None
