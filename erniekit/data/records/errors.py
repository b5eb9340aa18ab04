"""What is wrong with one record, and the one place that turns whatever reading or encoding it raises into its error."""

import os
import traceback
from types import TracebackType

from erniekit.utils.errors import DataError, UserError

# What a fault of a reader of records can raise for a record that nobody thought of. Not AssertionError, NameError,
# NotImplementedError and the like: those are faults whatever the record.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class BadRecord(Exception):
    """A record is wrong: the reason, and what to do about it. Its place is added by `reading`."""

    def __init__(self, reason: str, hint: str):
        super().__init__(reason)
        self.reason, self.hint = reason, hint

    @property
    def message(self) -> str:
        """Both as sentences."""
        return f"{self.reason}. Hint: {self.hint}{'' if self.hint.endswith(('?', '.')) else '.'}"


class BadLine(DataError):
    """A record is wrong, with its place: `on_bad_line: skip` ignores it."""


class MissingPackage(DataError):
    """The data need a Python package that is not installed: no fault of a record, so `on_bad_line: skip` does not
    ignore it.
    """


class reading:
    """Whatever reading one record raises becomes a BadLine that begins with `where`, its "file:line".

    A class and not a generator: entering one costs a tenth, and files have millions of records.
    """

    __slots__ = ("_where",)

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            _raise_placed(error, self._where)


def _raise_placed(error: BaseException, where: str) -> None:
    """Raise the BadLine of what reading a record raised; return if it is no fault of the record."""
    if isinstance(error, BadRecord):
        raise BadLine(f"{where}: {error.message}") from None
    if isinstance(error, MissingPackage):
        return
    if isinstance(error, UserError):
        if not str(error).startswith(where):
            raise BadLine(f"{where}: {error}") from error
    elif isinstance(error, _UNFORESEEN):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise BadLine(
            f"{where}: this record cannot be read ({type(error).__name__}: {str(error)[:200]}, in "
            f"{os.path.basename(frame.filename)}:{frame.lineno}). "
            "Hint: remove or fix it; a message as bare as this one is worth a report to erniekit."
        ) from error
