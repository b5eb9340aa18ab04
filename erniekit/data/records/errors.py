"""What is wrong with one record, and the one place that turns whatever reading or encoding it raises into its error."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from erniekit.utils.errors import DataError, UserError

# What a fault of a reader of records can raise for a record that nobody thought of. Not AssertionError, NameError,
# NotImplementedError and the like: those are faults whatever the record.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class BadRecord(Exception):
    """A record is wrong: the reason, and what to do about it. Its place is added by `reading`."""

    def __init__(self, reason: str, hint: str):
        super().__init__(reason)
        self.reason, self.hint = reason, hint


class BadLine(DataError):
    """A record is wrong, with its place: `on_bad_line: skip` passes over it."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Whatever reading one record raises becomes a BadLine that begins with `where`, its "file:line"."""
    try:
        yield
    except BadRecord as bad:
        raise BadLine(f"{where}: {bad.reason}. Hint: {bad.hint}.") from None
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise BadLine(f"{where}: {error}") from error
    except _UNFORESEEN as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise BadLine(
            f"{where}: this record cannot be read ({type(error).__name__}: {str(error)[:200]}, in "
            f"{os.path.basename(frame.filename)}:{frame.lineno}). "
            "Hint: remove or mend it; a message as bare as this one is worth a report to erniekit."
        ) from error
