"""Wrap the paragraphs and list items of the English documents at 100 columns.

    python tools/wrap_docs.py                  # every document
    python tools/wrap_docs.py docs/lora.md

Code blocks, tables, headings and what tools/make_doc_tables.py makes stay as they are; a code span or a link is never
broken. README.zh.md is wrapped by hand, since a line break between Chinese characters shows as a space.
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 100
ITEM = re.compile(r"(\s*)([*-]|\d+\.) +")
GLUE = "\x00"  # stands for a space at which no line may end


def unbroken(text: str) -> str:
    """The text with glue for the spaces inside code spans and links, and before what would start a list or a table."""
    text = re.sub(r"`[^`]+`|!?\[[^\]]*\]\([^)]*\)", lambda found: found[0].replace(" ", GLUE), text)
    return re.sub(r" (?=(?:[-+*#|>=]|\d+[.)])(?: |$))", GLUE, text)


def wrapped(lines: list[str]) -> list[str]:
    """One paragraph or list item as lines of at most COLUMNS, as far as its words allow."""
    item = ITEM.match(lines[0])
    first = item[0] if item else re.match(r"\s*", lines[0])[0]  # type: ignore[index]
    text = " ".join(line.strip() for line in [lines[0][len(first) :], *lines[1:]])
    result = textwrap.wrap(
        unbroken(text),
        COLUMNS,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in result]


def wrap(text: str) -> str:
    """The document with every paragraph and list item wrapped."""
    result: list[str] = []
    paragraph: list[str] = []
    until = ""

    def finish() -> None:
        if paragraph:
            result.extend(wrapped(paragraph))
            paragraph.clear()

    for line in text.splitlines():
        mark = line.strip()
        verbatim = (
            not mark or mark.startswith(("#", "|", "<", "```", "![")) or (not paragraph and line.startswith("    "))
        )
        if until or verbatim:
            finish()
            result.append(line)
            if until:
                until = "" if mark.startswith(until) else until
            elif mark.startswith("```"):
                until = "```"
            elif mark.startswith("<!-- begin:"):
                until = "<!-- end:"
            continue
        if ITEM.match(line):
            finish()
        paragraph.append(line)
    finish()
    return "\n".join(result) + "\n"


def documents() -> list[Path]:
    """Every English document of the repository."""
    patterns = ("*.md", "docs/*.md", "examples/*.md", "tools/*.md", "data/*.md")
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path for path in paths if not path.name.endswith(".zh.md")]


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or documents():
        old = path.read_text(encoding="utf-8")
        new = wrap(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: wrapped")


if __name__ == "__main__":
    main()
