"""Errors of single records, and the one place that turns exceptions of reading or encoding a record into them."""

import os
import traceback
from types import TracebackType

from erniekit.utils.errors import DataError, UserError

# Exceptions that a reader may raise for a malformed record that it does not expect. AssertionError, NameError,
# NotImplementedError and the like are not among them: they are defects of the program, whatever the record.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class BadRecord(Exception):
    """A wrong record, with the reason and a hint what to do. `reading` adds its place."""

    def __init__(self, reason: str, hint: str):
        super().__init__(reason)
        self.reason, self.hint = reason, hint

    @property
    def message(self) -> str:
        """Both as sentences."""
        return f"{self.reason}. Hint: {self.hint}{'' if self.hint.endswith(('?', '.')) else '.'}"


SKIPPABLE = "(on_bad_line: skip ignores such lines)"  # ends the message of a wrong record that stops a run


class BadLine(DataError):
    """A wrong record with its place; `on_bad_line: skip` skips it."""


class MissingPackage(DataError):
    """The data need a Python package that is not installed: no fault of a record, so `on_bad_line: skip` does not
    ignore it.
    """


class reading:
    """A context that turns exceptions of reading one record into a BadLine with `where`, its "file:line".

    It is a class because entering a generator's context takes ten times as long, and files have millions of records.
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
    """Raise a BadLine for an exception of reading a record; return if the record did not cause the exception."""
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
