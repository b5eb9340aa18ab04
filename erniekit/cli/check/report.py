"""The result of a check: sections of findings, as text, as JSON, and as an exit code."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from erniekit.utils import log
from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.wording import count_of

Level = Literal["ok", "note", "warning", "error"]
EXIT_ERRORS, EXIT_WARNINGS = 1, 3
_WIDTH = 118


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    level: Level
    text: str


@dataclass
class Section:
    """The findings about one subject, such as the training data."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: Level, text: str) -> None:
        """Add a finding, unless it is there already."""
        finding = Finding(level, text)
        if finding not in self.findings:
            self.findings.append(finding)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """In this context, log lines become findings, and a UserError becomes a finding of level `error`."""
        with log.captured() as lines:
            errors: tuple[str, ...] = ()
            try:
                yield
            except ConfigError as caught:
                errors = caught.problems or (str(caught),)
            except UserError as caught:
                errors = (str(caught),)
        for is_warning, text in lines:
            self.add("warning" if is_warning else "note", text)
        for text in errors:
            self.add("error", text)

    @property
    def has_errors(self) -> bool:
        """Whether there is a finding of level `error`."""
        return any(finding.level == "error" for finding in self.findings)


@dataclass
class Report:
    """All sections, in the order in which they are shown."""

    command: str
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """A new section at the end."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def count(self, level: Level) -> int:
        """The number of findings of a level."""
        return sum(finding.level == level for section in self.sections for finding in section.findings)

    def exit_code(self, strict: bool) -> int:
        """1 if there are errors; 3 if there are warnings and `strict`; else 0."""
        if self.count("error"):
            return EXIT_ERRORS
        return EXIT_WARNINGS if strict and self.count("warning") else 0

    def to_text(self) -> str:
        """The report as plain lines, errors first in each section, and the outcome at the end."""
        lines: list[str] = []
        order: list[Level] = ["error", "warning", "ok", "note"]
        for section in self.sections:
            lines.append(section.title)
            for finding in sorted(section.findings, key=lambda finding: order.index(finding.level)):
                lines += _wrapped(finding)
        return "\n".join([*lines, "", self.outcome()])

    def outcome(self) -> str:
        """One line with the number of errors and warnings."""
        errors, warnings = self.count("error"), self.count("warning")
        if errors:
            counts = f"{count_of(errors, 'error')}, {count_of(warnings, 'warning')}"
            return f"{counts}: `erniekit {self.command}` would not run."
        if warnings:
            return f"No errors, {count_of(warnings, 'warning')}."
        return "No errors and no warnings."

    def to_dict(self, strict: bool) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "command": self.command,
            "exit_code": self.exit_code(strict),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "sections": [
                {"title": section.title, "findings": [vars(finding) for finding in section.findings]}
                for section in self.sections
            ],
        }


def _wrapped(finding: Finding) -> list[str]:
    begin = "  " if finding.level == "ok" else f"  {finding.level}: "
    first, *later_lines = finding.text.splitlines() or [""]
    lines = _wrap(first, begin, "    ") or [begin.rstrip()]
    for line in later_lines:
        indent = "    " + " " * (len(line) - len(line.lstrip()))
        lines += _wrap(line.lstrip(), indent, indent + "  ")
    return lines


def _wrap(text: str, first: str, others: str) -> list[str]:
    """Wraps `text` to lines of _WIDTH characters; `first` and `others` are the indents of the first and later lines."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
