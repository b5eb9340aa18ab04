"""Write the tables of documents that say what the code says: what each toolkit's keys mean here, and which example
files there are. The text around the tables is written by hand.

    python tools/make_doc_tables.py            # rewrite what is out of date
    python tools/make_doc_tables.py --check    # only say what is; exit code 1 if anything

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; BLOCKS says which function makes it. The names
of other toolkits' keys are in tests/golden/*_keys.txt; what they mean here is asked of erniekit/config.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from erniekit.config import compat, load, schema, synonyms
from erniekit.config.compat import Alias, Detail, Later, NoEffect
from erniekit.config.compat_keys import RULES

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
COMMANDS = {"run_chat": "chat", "run_eval": "eval", "run_export": "export"}  # all others: train

# What an alias does with its value, where it is more than passing it on.
CONVERSIONS: dict[Callable[..., object], str] = {
    compat.negated: "`True` becomes `False`, `False` becomes `True`",
    compat.lora_flag: "`True` means `LoRA`; `False` sets nothing",
    compat.reader_of_calls: "`FunctionCallSFTReader` means `messages`; other names set nothing",
    compat.weak: "gives way to the key itself",
    compat.weaker: "gives way to the key itself and to its other names",
    compat.bf16_flag: "`True` means `bf16`, `False` means `fp32`, where nothing else gives a precision",
    compat.is_given: "a granularity there, `True` or `False` here",
    compat.fp16_flag: "`True` means `fp16`; `False` sets nothing",
    compat.lowprecision_moment: "`True` means `bf16`; `False` sets nothing",
    compat.quantisation: "`weight_only_int8`: `wint8`; `weight_only_int4`: `wint4`; `weight_only_mix`: `wint4/8`; "
    "`wint8`, `wint4`, `wint4/8` and `nf4` as they are",
    compat.async_save: "the word `async_save` switches it on; the other words have no effect",
    compat.unless_zero: "0 switches it off",
    compat.every_module: "`all` and `all-linear` are the default",
    compat.truncation: "`delete` means `drop`",
}


def key_names(toolkit: str) -> list[str]:
    """The names of a toolkit's keys, in its own order."""
    return (ROOT / "tests" / "golden" / f"{toolkit}_keys.txt").read_text(encoding="utf-8").split()


def code(names: list[str]) -> str:
    """Names as Markdown code, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def grouped(pairs: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, text) pairs as (text, its names), in the order in which the texts first come."""
    groups: dict[str, list[str]] = {}
    for name, text in pairs:
        groups.setdefault(text, []).append(name)
    return list(groups.items())


def same(names: list[str]) -> list[str]:
    """Those that are keys here, too."""
    return [name for name in names if name in schema.fields()]


def accepted(names: list[str]) -> str:
    """Table of other names that are taken for a key."""
    rows = []
    for name in names:
        match RULES.get(name):
            case Alias(to=to, convert=convert):
                rows.append((f"`{name}`", f"`{to}`", CONVERSIONS.get(convert, "")))
    return table(("theirs", "here", "its value"), rows)


def without_effect(names: list[str]) -> str:
    """Table of keys that are accepted and do nothing, by reason."""
    pairs = [(name, rule.why) for name in names if isinstance(rule := RULES.get(name), NoEffect)]
    return table(("why it has no effect", "keys"), [(why, code(group)) for why, group in grouped(pairs)])


def not_there_yet(names: list[str]) -> str:
    """Table of keys that ask for what is not built, or only matter with it, by feature."""
    pairs = [(name, rule.feature) for name in names if isinstance(rule := RULES.get(name), Later)]
    refused = [(feature, code(group), "refused, unless it is off") for feature, group in grouped(pairs)]
    pairs = [(name, rule.of) for name in names if isinstance(rule := RULES.get(name), Detail)]
    fixed = [(name, why) for name in names for why in one_value(name)]
    refused += [(why, code(group), "accepted with one value only") for why, group in grouped(fixed)]
    ignored = [(f"only read with {of}", code(group), "accepted, with a note") for of, group in grouped(pairs)]
    return table(("what it belongs to", "keys", "what happens"), refused + ignored)


def one_value(name: str) -> list[str]:
    """The reason why a key has only one value here, or nothing where it has more."""
    match RULES.get(name):
        case object(only=_, why=why):
            return [why]
    return []


def renamed(names: list[str]) -> str:
    """Table of names that are refused with our name for them."""
    ours = synonyms.same()
    return table(("theirs", "here"), [(f"`{name}`", f"`{ours[name]}`") for name in names if name in ours])


def otherwise(names: list[str]) -> str:
    """Table of names that are refused with what to do instead."""
    answers = {name: text for name, text in synonyms.table().items() if name not in synonyms.same()}
    pairs = [(name, answers[name]) for name in names if name in answers]
    return table(("theirs", "what the error says"), [(code(group), text) for text, group in grouped(pairs)])


def unknown(names: list[str]) -> str:
    """The names that nothing here answers to."""
    return code([name for name in names if name not in {**schema.fields(), **RULES, **synonyms.table()}]) + "."


def every_name(names: list[str]) -> str:
    """Table of names, each with the one thing that happens to it."""
    pairs: list[tuple[str, str]] = []
    for name in names:
        match RULES.get(name):
            case Alias(to=to, convert=convert):
                pairs.append((name, f"`{to}`" + (f": {CONVERSIONS[convert]}" if convert in CONVERSIONS else "")))
            case NoEffect(why=why):
                pairs.append((name, f"no effect: {why}"))
            case Later(feature=feature):
                pairs.append((name, f"refused, unless it is off: {feature}"))
            case Detail(of=of):
                pairs.append((name, f"only read with {of}"))
            case object(only=_, why=why):
                pairs.append((name, f"one value only: {why}"))
            case _ if name in schema.fields():
                pairs.append((name, "the same key"))
            case _ if name in synonyms.table():
                pairs.append((name, f"unknown; the error says: {synonyms.table()[name]}"))
            case _:
                pairs.append((name, "unknown"))
    return table(("theirs", "here"), [(code(group), text) for text, group in grouped(pairs)])


def only_in_paddleformers() -> list[str]:
    """PaddleFormers' keys that ERNIEKit does not have."""
    return [name for name in key_names("paddleformers") if name not in key_names("erniekit")]


def needs(text: str) -> str:
    """How many GPUs the header of an example file asks for, in a few words."""
    line = " ".join(re.findall(r"^# Needs:(.*?)^# \w+:", text, re.MULTILINE | re.DOTALL)[0].replace("#", " ").split())
    if line.startswith("a CPU"):
        return re.split(r"[;.]", line)[0]
    if line.startswith("no GPU"):
        return "no GPU"
    if found := re.match(r"(\d+) GPUs? with 80 GB", line):
        if "(from ERNIEKit's published figure" in line:
            return f"{found[1]} x 80 GB (derived from ERNIEKit's figure)"
        published = "published figure" in line or "published layout" in line
        return f"{found[1]} x 80 GB" + (" (ERNIEKit's figure)" if published else " (from its degrees)")
    return "more than one GPU"


def precision(compute_type: str) -> str:
    """The base's precision, as people call it."""
    return {"wint4/8": "experts in 4 bits, the rest in 8", "bf16": "bf16", "fp32": "fp32"}.get(
        compute_type, compute_type
    )


def example_files() -> str:
    """One table a model: each file, what it does, its row length, what it needs."""
    parts = []
    for model in sorted({path.relative_to(CONFIGS).parts[0] for path in CONFIGS.rglob("*.yaml")}, key=model_size):
        rows = []
        for path in sorted((CONFIGS / model).rglob("*.yaml"), key=file_order):
            command = COMMANDS.get(path.stem, "train")
            cfg = load(str(path), None, command)
            name = path.relative_to(CONFIGS / model).as_posix()
            link = f"[{name}](configs/{model}/{name})"
            method = f"{cfg.stage}, {cfg.fine_tuning}" if command == "train" else ""
            length = f"{cfg.max_seq_len:,}" if command in ("train", "eval") else ""
            rows.append(
                (link, f"`{command}`", method, precision(cfg.compute_type), length, needs(path.read_text("utf-8")))
            )
        parts.append(f"## {model}\n\n" + table(("file", "command", "method", "precision", "row length", "needs"), rows))
    return "\n\n".join(parts)


def model_size(name: str) -> tuple[float, str]:
    """Sorts models by their number of parameters, the tiny ones first."""
    found = re.search(r"([\d.]+)B", name)
    return (float(found[1]) if found else 0.0, name)


def file_order(path: Path) -> tuple[object, ...]:
    """Sorts files by directory, then by kind, then by row length as a number."""
    length = re.search(r"_(\d+)k$", path.stem)
    return (path.parent.as_posix(), re.sub(r"_\d+k$", "", path.stem), int(length[1]) if length else 0)


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/from-erniekit.md": {
        "accepted": lambda: accepted(key_names("erniekit")),
        "without effect": lambda: without_effect(key_names("erniekit")),
        "not there yet": lambda: not_there_yet(key_names("erniekit")),
    },
    "docs/from-paddleformers.md": {"keys": lambda: every_name(only_in_paddleformers())},
    "docs/from-llama-factory.md": {
        "same": lambda: code(same(key_names("llama_factory"))) + ".",
        "accepted": lambda: accepted(key_names("llama_factory")),
        "renamed": lambda: renamed(key_names("llama_factory")),
        "otherwise": lambda: otherwise(key_names("llama_factory")),
        "without effect": lambda: without_effect(key_names("llama_factory")),
        "unknown": lambda: unknown(key_names("llama_factory")),
    },
    "examples/README.md": {"files": example_files},
}


def filled(document: str, text: str) -> str:
    """The document's text with its tables made anew."""
    for name, make in BLOCKS[document].items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{document}: expected one {begin} and one {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = 0
    for document in BLOCKS:
        path = ROOT / document
        old = path.read_text(encoding="utf-8")
        new = filled(document, old)
        if new != old:
            stale += 1
            print(f"{document}: {'out of date' if args.check else 'rewritten'}")
            if not args.check:
                path.write_text(new, encoding="utf-8")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
