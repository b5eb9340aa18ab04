"""Errors that a user can cause. Each message says what is wrong, where, and what to do next. The command line prints it
without a traceback.
"""

import errno
from collections.abc import Sequence


class UserError(ValueError):
    """Base of every error that a user can cause and correct."""


class ConfigError(UserError):
    """A YAML key or a command-line argument is wrong. problems: the individual problems, if there are several."""

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(UserError):
    """A data file or a line of it is wrong."""


class CheckpointError(UserError):
    """A model directory, a weight file or a training checkpoint is wrong."""


class PeerError(CheckpointError):
    """An error that another rank met, as this rank heard of it."""


class EvaluationError(UserError):
    """An evaluation cannot compute its metrics."""


class TrainError(UserError):
    """Training cannot continue: a non-finite loss, an output directory of another run, a full disk."""


class PeerGoneError(TrainError):
    """The process of another rank has ended."""


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed because no space was left, or because the user's quota was used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
