"""The public keys, one by one: a key that comes, goes or changes its status is a reviewed event.

To accept a change, from the repository's root: PYTHONPATH=. python tests/test_knobs.py > tests/golden/knobs.txt
"""

import ast
import dataclasses
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY, read_package

from erniekit.config import load, schema
from erniekit.config.compat import Alias, Detail, Fixed, Later, NoEffect, Rule
from erniekit.config.compat_keys import RULES
from erniekit.utils.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"

# Keys that config itself acts on: it refuses what they ask for, or a check needs them.
READ_BY_CONFIG = {"do_train", "fine_tuning", "rslora_plus", "dataset_type", "optim", "rl_algorithm", "code_sandbox"}

# Keys whose reader is not written yet. This set only shrinks.
NOT_WIRED: set[str] = set()


def status(rule: Rule) -> str:
    """What a name without a field does, in a few words."""
    match rule:
        case Alias(to=to):
            return f"alias of {to}"
        case NoEffect(why=why):
            return f"no effect: {why}"
        case Detail(of=of):
            return f"later: read only with {of}"
        case Later(feature=feature):
            return f"later: {feature}"
        case Fixed(only=only, why=why):
            return f"only {', '.join(map(str, only)) or 'null'}: {why}"


def knobs() -> list[str]:
    """One line a key: group, type and default, or status."""
    lines = [f"{name}: {status(rule)}" for name, rule in RULES.items()]
    for group, arguments in schema.GROUPS.items():
        for field in dataclasses.fields(arguments):
            kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            lines.append(f"{field.name}: honoured, {group}, {kind}, default {field.default}")
    return sorted(lines)


def test_the_public_keys_are_the_reviewed_ones():
    golden = (GOLDEN / "knobs.txt").read_text(encoding="utf-8").splitlines()
    new, gone = sorted(set(knobs()) - set(golden)), sorted(set(golden) - set(knobs()))
    assert not new and not gone, "\n".join(
        ["keys changed; see this file's docstring", *(f"+ {n}" for n in new), *(f"- {g}" for g in gone)]
    )


def test_no_key_has_two_meanings():
    assert not schema.fields().keys() & RULES.keys()
    for name, rule in RULES.items():
        if isinstance(rule, Alias):
            assert rule.to in schema.fields(), name


@pytest.mark.parametrize("name", (GOLDEN / "erniekit_keys.txt").read_text(encoding="utf-8").split())
def test_every_key_of_erniekit_is_known(name):
    """Known: its value may be wrong here, but the key is not."""
    try:
        load(None, {name: "1"}, "version")
    except ConfigError as error:
        assert "unknown key" not in str(error)


def test_every_key_is_documented_in_a_line():
    for name, field in schema.fields().items():
        doc = field.metadata["doc"]
        assert 15 <= len(doc) <= 230 and doc.endswith(".") and "\n" not in doc, name
    for name, rule in RULES.items():
        if isinstance(rule, NoEffect):
            assert len(rule.why) > 10, name


def keys_read() -> set[str]:
    """Every `cfg.name`, `self.cfg.name` and, of a group of keys, `args.name` in the package outside config, and what
    the properties of Config among them read.
    """
    package, found = read_package(REPOSITORY), set[str]()
    for module in package.values():
        for node in module.nodes if module.unit != "config" else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner.lstrip("_") in ("cfg", "args"):
                    found.add(node.attr)
    for node in ast.walk(package["erniekit.config.schema"].tree):
        if isinstance(node, ast.FunctionDef) and node.name in found:
            names = (inner for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
            found |= {name.attr for name in names if isinstance(name.value, ast.Name) and name.value.id == "self"}
    return found


def test_every_honoured_key_is_read():
    unread = set(schema.fields()) - keys_read() - READ_BY_CONFIG
    assert unread <= NOT_WIRED, f"nothing reads {sorted(unread - NOT_WIRED)}: wire them, or move them to compat_keys.py"
    assert unread >= NOT_WIRED, f"now read, take them off the list: {sorted(NOT_WIRED - unread)}"


if __name__ == "__main__":
    print("\n".join(knobs()))
