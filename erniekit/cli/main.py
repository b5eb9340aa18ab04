"""The `erniekit` command: finds the sub-command, runs it, and turns an error into one message and an exit code.

This module imports only the standard library, and a sub-command's module only to run it, so that `erniekit help`
answers at once and without Paddle.

Exit codes: 0 done; 1 something that the user can fix (erniekit.utils.errors, a full disk, Paddle not installed);
2 no such command; 3 `check` with strict=true found warnings and no error, or a run does not fit by `plan`;
70 a defect of erniekit itself; 130 interrupted (128 + the number of another signal); 141 nobody reads standard output
any more.
"""

import errno
import signal
import sys
from collections.abc import Callable
from typing import Any

from erniekit.cli.commands import ALIASES, COMMANDS, Command
from erniekit.utils import heartbeat, runtime, stop_signals, streams
from erniekit.utils.errors import PeerError, PeerGoneError, UserError, disk_is_full

EXIT_USER_ERROR, EXIT_USAGE, EXIT_DEFECT, EXIT_BROKEN_PIPE = 1, 2, 70, 141
# Commands that listen for all signals once they have imported Paddle, which replaces the handlers.
_LISTENING = ("train", "eval", "export", "split", "convert")

NEEDS_PADDLE = (
    "`erniekit {name}` needs PaddlePaddle, which is not installed in this Python environment.\n"
    "On a CPU: pip install 'erniekit[cpu]' (in a checkout: pip install '.[cpu]'). "
    "On a GPU: install the paddlepaddle-gpu that fits your CUDA, as PaddlePaddle's installation guide says."
)
DISK_FULL = (
    "no space left on the disk{where}\n"
    "Free some space, or set output_dir to another disk, and run the same command again. "
    "Checkpoints that were complete are kept."
)
NOT_ALLOWED = (
    "not allowed to read or write{where}\n"
    "Change its permissions, or name another path (output_dir is where a run writes)."
)

OUT_OF_MEMORY = (
    "memory ran out ({reason}).\n{cure} Another program, or a limit (ulimit -v, a container's), may hold it."
)
_LOWER = {
    "train": (
        "Lower batch_size (gradient_accumulation_steps keeps the rows of a step) or max_seq_len, set recompute: true, "
        "fine_tuning: LoRA or a parallel degree, or use a smaller model. Checkpoints that were complete are kept."
    ),
    "eval": "Lower batch_size, max_seq_len or max_new_tokens, or use a smaller model.",
    "chat": "Lower max_seq_len or max_new_tokens, or use a smaller model.",
    "server": "Lower max_num_seqs or max_model_len, or use a smaller model.",
    "export": "Lower max_shard_size.",
    "split": "Lower max_shard_size.",
}
# Texts by which a lack of memory is recognised in exceptions other than MemoryError: Paddle's (the last one inside a
# backward pass), the dynamic linker's while Paddle is imported, and those of Python's threads.
_MEMORY_SIGNS = (
    "(ResourceExhausted)",
    "MemoryError",
    "failed to map segment",
    "Cannot allocate memory",
    "cannot allocate memory",
    "can't start new thread",
)


def main(argv: list[str] | None = None) -> int:
    """Run one command line (default: `sys.argv` without the program's name) and return its exit code."""
    if argv is None:
        runtime.require_utf8()
    streams.prepare()
    runtime.prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    name = ALIASES.get(args[0], args[0]) if args else "help"
    if argv is None:
        _begin_to_listen(name)
    try:
        code = _dispatch(name, args[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        if argv is None:  # the process is ending: a further Ctrl-C ends it silently
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _interrupted(error)
    except Exception as error:
        # A signal may raise in Python code called from native code, which turns the exception into another one.
        return _interrupted(stop_signals.raised()) if stop_signals.raised() else _report(name, error)


def _begin_to_listen(name: str) -> None:
    """Prepare the process for signals until its command listens for them. `chat` has Python's handler for Ctrl-C, by
    which it stops an answer.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # An agent starts its workers with the signals blocked; they listen when they can report their end to it.
    is_blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if name != "chat" and not is_blocked:
        stop_signals.listen(signals=(signal.SIGINT,))
    # blocked until handlers are installed, so that numpy's threads inherit the blocked signals
    if name in _LISTENING:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _interrupted(error: BaseException | None) -> int:
    """Log one line about the interruption and return the exit code."""
    number = error.number if isinstance(error, stop_signals.Stopped) else signal.SIGINT
    return _fail(stop_signals.interrupted(number), 128 + number)


def _dispatch(name: str, args: list[str]) -> int:
    if name not in COMMANDS:
        return _unknown(name)
    if name != "help" and any(arg in ("-h", "--help") for arg in args):
        name, args = "help", [name]
    command = COMMANDS[name]
    if not command.takes_config:
        code: int = _function(command)(args)
        return code
    from erniekit.cli import launch

    # before the command is imported: Paddle takes seconds, and a mistake in the file is reported at once
    cfg = launch.configure(args, name)
    if name in launch.ON_RANKS and not launch.is_worker():
        job = launch.job_of(cfg, args, name)
        if job is not None:
            from erniekit.cluster import agent

            stop_signals.listen()
            return agent.run(job)
    function = _function(command)
    if name in _LISTENING:  # only now, since importing Paddle replaces signal handlers
        stop_signals.listen()
    elif launch.is_worker():  # its agent has started it with blocked signals
        stop_signals.listen(signals=set(stop_signals.SIGNALS) - {signal.SIGINT})
    function(cfg)
    return 0


def _function(command: Command) -> Callable[..., Any]:
    """The function that runs a command."""
    import importlib

    module_name, _, function_name = command.target.partition(":")
    with runtime.importing():
        function: Callable[..., Any] = vars(importlib.import_module(module_name))[function_name]
    return function


def _unknown(name: str) -> int:
    from erniekit.cli import info

    nearest = info.nearest(name)
    hint = f"\nDid you mean: erniekit {nearest}" if nearest else ""
    return _fail(f"Unknown command: {name}{hint}\n\n{info.usage()}", EXIT_USAGE)


def _report(name: str, error: Exception) -> int:
    """Log an error: one message if the user can fix it, a traceback otherwise. Returns the exit code."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return EXIT_BROKEN_PIPE
    message = _explain(name, error)
    if message is not None:
        return _fail(f"error: {message}", EXIT_USER_ERROR, isinstance(error, PeerError | PeerGoneError))
    import traceback

    trace = "".join(traceback.format_exception(error))
    return _fail(
        f"{trace}\n`erniekit {name}` failed. This is a bug in erniekit, please report it with the lines above.",
        EXIT_DEFECT,
    )


def _explain(name: str, error: Exception) -> str | None:
    """The message about an error that the user can fix; None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "paddle":
        return NEEDS_PADDLE.format(name=name)
    reason = _memory_ran_out(error)
    if reason is not None:
        return OUT_OF_MEMORY.format(reason=reason, cure=_LOWER.get(name, "Use a smaller model."))
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        if disk_is_full(error):
            return DISK_FULL.format(where=where)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return NOT_ALLOWED.format(where=where)
    return None


def _memory_ran_out(error: Exception) -> str | None:
    """One line about the failed allocation; None if the error is of another kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if any(sign in line for sign in _MEMORY_SIGNS)]
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        reasons = reasons or lines or ["no block of memory was left"]
    return f"{reasons[0]:.200}" if reasons else None


def _fail(message: str, code: int, by_peer: bool = False) -> int:
    streams.flush()
    if not heartbeat.fail(message, by_peer):
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:  # standard error is closed; only the exit code is left
            streams.silence(sys.stderr)
    return code


def _stdout_is_closed() -> bool:
    """Whether our own standard output was closed. If so, it is redirected to /dev/null, since Python would otherwise
    report it again at exit. A broken pipe elsewhere (a data worker that died) is another case and must not be silent.
    """
    is_closed = streams.is_gone(sys.stdout)
    if is_closed:
        streams.silence(sys.stdout)
    return is_closed


if __name__ == "__main__":  # python -m erniekit.cli.main
    sys.exit(main())
