"""Write docs/config.md, the reference of all keys, from the schema and the table of other names.

python tools/make_config_page.py            # writes docs/config.md
python tools/make_config_page.py --check    # exit code 1 if the page is not what would be written
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from wrap_docs import wrap

from erniekit.config import reference
from erniekit.config.compat import Alias, Detail, Fixed, Later, NoEffect
from erniekit.config.compat_keys import RULES
from erniekit.config.schema import GROUPS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "config.md"
ERNIEKIT_KEYS = ROOT / "tests" / "golden" / "erniekit_keys.txt"

HEAD = """\
# Every key of the configuration

This page is made from the schema by `python tools/make_config_page.py`; do not edit it. It is in
English only. `erniekit help COMMAND` prints the keys that a command reads. How a file is read, and
how values are written, is in [configuration.md](configuration.md).

The last column says what ERNIEKit calls the key: "same", another name, or "own" where ERNIEKit has
none. A key that another key makes pointless is named at start-up, and by `erniekit check`.
"""

DEFAULTS = """
## Defaults of some methods

With these stages, keys that are not given have other values than the tables above say.

| stage | key | default |
| --- | --- | --- |
"""

OTHER_NAMES = """
## Other names of these keys

Names of ERNIEKit and its relatives. A key may be given under one of its names only, unless both
agree.

| name | is |
| --- | --- |
"""

NO_EFFECT = """
## Accepted without effect

Each is named at start-up with its reason.

| reason | keys |
| --- | --- |
"""

REFUSED = """
## Refused

These ask for something that this version does not have. A value that asks for nothing (off, null,
0) is accepted.

| what is missing | keys |
| --- | --- |
"""

FIXED = """
## Accepted with one value

Another value is refused, and the reason says what to do in its place.

| reason | keys |
| --- | --- |
"""

DETAILS = """
## Read only with something that is missing

Accepted and named at start-up: each is a detail of a feature that this version does not have.

| feature | keys |
| --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not current")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/config.md is not current: run python tools/make_config_page.py")


def page() -> str:
    """The whole page, wrapped as every document is."""
    return wrap("".join([HEAD, *map(_group, GROUPS), DEFAULTS, *_defaults(), OTHER_NAMES, *_aliases(), *_rules()]))


def _group(name: str) -> str:
    title = name[0].upper() + name[1:]
    head = (
        f"\n## {title}\n\n{reference.group_doc(name)}\n\n| key | type | default | limits | what it does | ERNIEKit |\n"
    )
    return head + "| --- | --- | --- | --- | --- | --- |\n" + "".join(map(_row, reference.by_group()[name]))


def _row(entry: reference.KeyEntry) -> str:
    cells = [f"`{entry.name}`", entry.type, f"`{entry.default}`", entry.limits, entry.doc, _theirs(entry.name)]
    if entry.default in ("not given", "empty"):
        cells[2] = entry.default
    return _line(cells)


def _theirs(name: str) -> str:
    """What ERNIEKit calls a key of ours."""
    known = ERNIEKIT_KEYS.read_text(encoding="utf-8").split()
    if name in known:
        return "same"
    aliases = [alias for alias, rule in RULES.items() if isinstance(rule, Alias) and rule.to == name]
    return ", ".join(f"`{alias}`" for alias in aliases if alias in known) or "own"


def _defaults() -> Iterable[str]:
    return (_line([stages, f"`{key}`", f"`{value}`"]) for key, value, stages in reference.method_defaults())


def _aliases() -> Iterable[str]:
    for name, rule in sorted(RULES.items()):
        if isinstance(rule, Alias):
            yield _line([f"`{name}`", f"`{rule.to}`"])


def _rules() -> Iterable[str]:
    kinds: list[tuple[str, dict[str, list[str]]]] = [(NO_EFFECT, {}), (REFUSED, {}), (DETAILS, {}), (FIXED, {})]
    for name, rule in RULES.items():
        match rule:
            case NoEffect(why=why):
                kinds[0][1].setdefault(why, []).append(name)
            case Later(feature=feature):
                kinds[1][1].setdefault(feature, []).append(name)
            case Detail(of=of):
                kinds[2][1].setdefault(of, []).append(name)
            case Fixed(why=why):
                kinds[3][1].setdefault(why, []).append(name)
    for head, table in kinds:
        yield head
        for reason, names in table.items():
            yield _line([reason, ", ".join(f"`{name}`" for name in names)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    main()
