"""Errors that a user can cause. The message says what is wrong, where, and what to do next; the CLI prints it without a
traceback.
"""


class UserError(ValueError):
    """Base of every error that a user can cause and mend."""


class ConfigError(UserError):
    """A YAML key or a command-line argument is wrong."""


class DataError(UserError):
    """A data file or a line of it is wrong."""


class CheckpointError(UserError):
    """A model directory, a weight file or a training checkpoint is wrong."""


class EvaluationError(UserError):
    """An evaluation gives no number."""


class TrainError(UserError):
    """Training cannot go on: a non-finite loss, an output directory of another run, a full disk."""
