"""The directory that a command writes a model to: a new one, or one that the same command wrote before."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from erniekit.checkpoint.model_dir import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    GENERATION_CONFIG_FILE,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    checkpoint_step,
    list_checkpoints,
    model_files,
    say_links,
    staged,
)
from erniekit.checkpoint.run_record import RUN_FILE
from erniekit.quantize.report import REPORT_FILES
from erniekit.utils import atomic, log
from erniekit.utils.directory_lock import DirectoryLock, make_directory
from erniekit.utils.errors import CheckpointError, UserError
from erniekit.utils.user_files import read_json_object

SOURCE_FILE = ".erniekit_source.json"
# Files of another model that would otherwise be taken for files of the one that replaces it.
_OF_A_MODEL = (*TOKENIZER_FILES, *PROCESSOR_FILES, GENERATION_CONFIG_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE)


@contextmanager
def model_target(
    target_dir: str | Path, command: str, sources: Sequence[str | Path], overwrite: bool, cure: str
) -> Iterator[Path]:
    """A context with a temporary directory whose files move to `target_dir` on success (see
    checkpoint.model_dir.staged).

    An existing model is replaced only with `overwrite`, or if `command` wrote it from the same `sources`, which are
    directories of models or of runs. Otherwise CheckpointError is raised before anything is read; `cure` is the option
    that it names. ConfigError if another process is writing to `target_dir`.
    """
    for source in sources:
        if not Path(source).is_dir():
            raise CheckpointError(
                f"there is no model directory {str(source)!r} (looked in {Path.cwd()}). Check the path; a model of a "
                "Hub has to be downloaded first."
            )
    target = Path(target_dir)
    mark = _mark(command, sources)
    _is_replaced(target, mark, overwrite, sources[0], cure)  # raises before anything is created
    make_directory(target.parent, "the target")
    real = target.resolve()
    lock = DirectoryLock(real, "target", atomic.lock_file(atomic.shared_temporary(real)))
    lock.acquire()
    try:
        replaced = _is_replaced(target, mark, overwrite, sources[0], cure)  # again: another process may have written
        if replaced:
            log.info(f"{cure}: replaces the model in {target}")
        for source in sources:
            say_links(source)
        with staged(target, (*REPORT_FILES, *(_OF_A_MODEL if replaced else ()))) as staging:
            yield staging
            atomic.write_json(staging / SOURCE_FILE, mark)
    finally:
        lock.release()


def check_target(
    target_dir: str | Path, command: str, sources: Sequence[str | Path], overwrite: bool, cure: str
) -> None:
    """Raise CheckpointError where `model_target` would, and change nothing."""
    _is_replaced(Path(target_dir), _mark(command, sources), overwrite, sources[0], cure)


def _is_replaced(target: Path, mark: dict[str, str], overwrite: bool, source: str | Path, cure: str) -> bool:
    """Whether the target has another model that may be replaced; an error if it may not, or is no directory."""
    if not target.is_dir():
        if target.exists():
            raise CheckpointError(f"{target} is a file where a directory is to be written: move it elsewhere.")
        return False
    if (target / RUN_FILE).exists() or list_checkpoints(target):
        raise CheckpointError(
            f"{target} is the output_dir of a run: its own final model belongs there. Choose another directory."
        )
    files = model_files(target)
    for path in files:
        if path.is_dir():
            raise CheckpointError(f"{path} is a directory where a file is to be written: move it elsewhere.")
    if not files or _read_mark(target) == mark:
        return False
    if not overwrite:
        raise CheckpointError(
            f"{target} holds another model than what was written from {source}. Choose another directory, remove that "
            f"model, or set {cure} to replace it."
        )
    return True


def _mark(command: str, sources: Sequence[str | Path]) -> dict[str, str]:
    """The mark of a directory: the command that wrote it, and a hash of its sources (a hash, since model directories
    are passed on to others). All checkpoints of a run count as one source.
    """
    roots = []
    for source in sources:
        path = Path(source).resolve()
        roots.append(str(path.parent if checkpoint_step(path) is not None else path))
    return {"command": command, "source": hashlib.sha256("\n".join(roots).encode()).hexdigest()}


def _read_mark(target: Path) -> dict[str, object] | None:
    try:
        return read_json_object(target / SOURCE_FILE, UserError)
    except (FileNotFoundError, UserError):
        return None
