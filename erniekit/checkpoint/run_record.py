"""run.json: the identity of a run, in its output directory. It distinguishes the run's own files from another run's."""

import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from os import getpid
from pathlib import Path
from typing import Any

from erniekit.utils import atomic
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject, read_json_object

RUN_FILE = "run.json"


@dataclass
class FinalModel:
    """The end of a run that wrote the final model: its last step, its branch, the planned number of steps, and whether
    the data ended before it.
    """

    step: int
    branch: int
    max_steps: int
    data_ended: bool


@dataclass
class RunRecord:
    """A run: its id, its start time, its identity (configuration, base model and data, as in a checkpoint's
    TrainState), its branch and its last start.

    A new branch begins when a run goes back to an older checkpoint; the later checkpoints belong to the old branch.
    """

    identity: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    created: str = field(default_factory=lambda: time.strftime("%F %T"))
    branch: int = 1
    start: dict[str, Any] = field(default_factory=dict)
    final_model: FinalModel | None = None

    def begin(self, step: int) -> None:
        """Record that a process begins to train after `step`."""
        process = {"host": socket.gethostname(), "pid": getpid(), "time": time.strftime("%F %T")}
        self.start = {"id": secrets.token_hex(8), "after_step": step} | process

    def write(self, output_dir: Path) -> None:
        """Replace output_dir/run.json."""
        atomic.write_json(output_dir / RUN_FILE, asdict(self))


def read_record(output_dir: Path) -> RunRecord | None:
    """The record of the run in a directory; None if there is none. CheckpointError if it cannot be read."""
    file = output_dir / RUN_FILE
    try:
        fields = JsonObject(read_json_object(file, CheckpointError), str(file), CheckpointError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except CheckpointError as error:
        raise CheckpointError(f"{error} Without {file} the run is recognised by its checkpoints.") from None
    final = fields.get_object("final_model")
    return RunRecord(
        identity=dict(fields.get_object("identity").values),
        base=dict(fields.get_object("base").values),
        data=dict(fields.get_object("data").values),
        id=fields.get_text("id", ""),
        created=fields.get_text("created", ""),
        branch=fields.get_int("branch", 1),
        start=dict(fields.get_object("start").values),
        final_model=FinalModel(
            final.get_int("step", 0),
            final.get_int("branch", 1),
            final.get_int("max_steps", 0),
            final.get_bool("data_ended", False),
        )
        if final.values
        else None,
    )


def start_id(output_dir: Path) -> str | None:
    """The id of the last start of the run in a directory. If it changes, another process has begun to train."""
    try:
        record = read_record(output_dir)
    except CheckpointError:
        return None
    return None if record is None else record.start.get("id")
