"""Accelerators by name, from hardware.yaml and from a file of the user's that has the same form.

Every number in hardware.yaml is written with its source. A user's file may give plain numbers; it changes numbers of
known cards, or adds cards (`like: H100` starts from a known one).
"""

import difflib
import functools
import importlib.resources
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from erniekit.config.values import Scalar, parse_number, shown
from erniekit.config.yaml_tree import Pairs, read_mapping
from erniekit.utils import log
from erniekit.utils.errors import ConfigError
from erniekit.utils.user_files import read_text

FILE = "hardware.yaml"
PRECISIONS = ("bf16", "fp8", "fp8_blockwise")  # how products are computed; "bf16" stands for 16 bits
TERA, GIGA, MICRO = 1e12, 1e9, 1e-6


@dataclass(frozen=True)
class Efficiency:
    """What is reached of a card's peak numbers; see hardware.yaml for what each is relative to."""

    product: Mapping[str, float]
    grouped: Mapping[str, float]
    weight_gradient: Mapping[str, float]
    attention: Mapping[str, float]
    memory: float
    permute: float
    fast: Mapping[str, float]
    network: Mapping[str, float]
    latency_us: Mapping[str, float]
    size: tuple[tuple[int, float], ...]

    def of_size(self, smallest: float) -> float:
        """The efficiency of a product whose smallest dimension is `smallest`, relative to the largest products:
        interpolated in the logarithm of the size.
        """
        below, at = self.size[0]
        if smallest <= below:
            return at * smallest / below
        for (low, left), (high, right) in zip(self.size, self.size[1:]):
            if smallest <= high:
                return left + (right - left) * math.log(smallest / low) / math.log(high / low)
        return self.size[-1][1]


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links. Fields are in the units of hardware.yaml, properties in bytes, seconds, FLOP/s."""

    name: str
    bf16: float
    fp16: float
    fp8: float
    fp32: float
    memory_bytes: float
    memory_tb_s: float
    fast_gb_s: float
    network_gb_s: float
    pcie_gb_s: float
    launch_us: float
    efficiency: Efficiency
    contested: str = ""
    capability: tuple[int, int] | None = None

    @property
    def half_peak(self) -> float:
        """FLOP/s of 16-bit products: of bf16, or of fp16 where the card has no bf16. MFU refers to it."""
        return (self.bf16 or self.fp16) * TERA

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second that elementwise kernels reach."""
        return self.memory_tb_s * TERA * self.efficiency.memory

    @property
    def launch_seconds(self) -> float:
        """Host time of a kernel launch."""
        return self.launch_us * MICRO

    def peak(self, precision: str) -> float:
        """FLOP/s of products in one of PRECISIONS, or in fp32. A card without FP8 units raises ConfigError."""
        if precision in ("bf16", "fp32"):
            return self.half_peak if precision == "bf16" else self.fp32 * TERA
        if not self.fp8:
            raise ConfigError(f"gpu: {self.name} has no FP8 units. Plan another card, or leave FP8 out.")
        return self.fp8 * TERA

    def link(self, collective: str, num_ranks: int, spans_hosts: bool) -> tuple[float, float]:
        """(bytes a second that one rank sends, seconds of latency) of a collective over `num_ranks` ranks."""
        kind = "network" if spans_hosts else "fast"
        rate = self.network_gb_s if spans_hosts else self.fast_gb_s
        table = self.efficiency.network if spans_hosts else self.efficiency.fast
        hops = math.log2(num_ranks) if spans_hosts else num_ranks - 1  # trees between hosts, rings within
        return rate * GIGA * table[collective], self.efficiency.latency_us[kind] * MICRO * max(hops, 1)


_NO_NUMBERS = ("name", "efficiency", "contested", "capability")
_NUMBERS = tuple(field.name for field in fields(Hardware) if field.name not in _NO_NUMBERS)
_TABLES = {
    "product": PRECISIONS,
    "grouped": PRECISIONS,
    "weight_gradient": PRECISIONS,
    "attention": ("forward", "backward"),
    "fast": ("all_reduce", "all_gather", "all_to_all", "dispatch", "send"),
    "network": ("all_reduce", "all_gather", "all_to_all", "dispatch", "send"),
    "latency_us": ("fast", "network"),
}
_WORDS = ("names", "like", "contested", "efficiency", "capability")
_NO_EFFECT = "fast_ranks"  # of a user's file


def load_hardware(name: str, user_file: str | Path | None = None) -> Hardware:
    """The accelerator of this name or alternative name, whatever its case, spaces and hyphens.

    Raises:
        ConfigError: no such accelerator, with the nearest names; or the user's file is wrong, with the line.
    """
    tables = _Tables(user_file)
    wanted = _key(name)
    for card, entry in tables.cards.items():
        if wanted in {_key(card), *map(_key, entry.get("names", []))}:
            return tables.hardware(card)
    names = {_key(card): card for card in tables.cards}
    near = [names[key] for key in difflib.get_close_matches(wanted, names, n=3, cutoff=0.3)]
    hint = f" Nearest names: {', '.join(near)}." if near else ""
    raise ConfigError(
        f"gpu: {name!r} is not in the hardware table.{hint} Known: {', '.join(tables.cards)}. Describe another one in "
        "a YAML file of your own (hardware=FILE)."
    )


def hardware_names(user_file: str | Path | None = None) -> list[str]:
    """The names of all accelerators in the table, those of the user's file included."""
    return list(_Tables(user_file).cards)


def numbers_with_sources() -> Iterator[tuple[str, float, str]]:
    """(place, number, source) of every number in hardware.yaml. KeyError: a source that is not described."""
    described = _packaged()["sources"]

    def walk(value: Any, place: str) -> Iterator[tuple[str, float, str]]:
        if isinstance(value, _Number):
            yield place, value.value, described[value.source]
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{place}.{key}" if place else key)

    yield from walk({key: value for key, value in _packaged().items() if key != "sources"}, "")


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


@dataclass(frozen=True)
class _Number:
    value: float
    source: str
    place: str


class _Tables:
    """The packaged tables, with the user's file laid over them."""

    def __init__(self, user_file: str | Path | None) -> None:
        packaged = _packaged()
        self.cards: dict[str, dict[str, Any]] = dict(packaged["cards"])
        self.efficiencies: dict[str, dict[str, Any]] = dict(packaged["efficiencies"])
        self.size: dict[str, _Number] = dict(packaged["size"])
        if user_file is not None:
            self._add(_read(Path(user_file)), str(user_file))

    def _add(self, content: dict[str, Any], where: str) -> None:
        unknown = [key for key in content if key not in ("cards", "efficiencies", "size", "sources")]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}. Use cards, efficiencies, size or sources.")
        for section, known in (("cards", self.cards), ("efficiencies", self.efficiencies)):
            for name, entry in _mapping(content.get(section, {}), f"{where}: {section}").items():
                entry = _mapping(entry, f"{where}: {section}: {name}")
                known[name] = _merged(known.get(name, {}), entry)
        self.size |= _mapping(content.get("size", {}), f"{where}: size")

    def hardware(self, name: str) -> Hardware:
        """The card of exactly this name, with everything that it takes from others."""
        entry = self._resolve(self.cards, name, "cards")
        if _NO_EFFECT in entry:
            log.once(f"hardware: {name}: {_NO_EFFECT}: no effect: gpus_per_node says how many cards have fast links")
        for key in entry:
            if key not in (*_NUMBERS, *_WORDS, _NO_EFFECT):
                raise ConfigError(f"hardware: {name}: unknown key {key!r}. Known: {', '.join((*_NUMBERS, *_WORDS))}.")
        numbers = {key: _positive(entry, key, name) for key in _NUMBERS}
        if not max(numbers["bf16"], numbers["fp16"]):
            raise ConfigError(f"hardware: {name}: bf16 or fp16 must be above 0.")
        efficiency = self._efficiency(str(entry.get("efficiency", "unknown")))
        capability = None
        if "capability" in entry:
            tenths = round(10 * _positive(entry, "capability", name))
            capability = tenths // 10, tenths % 10
        return Hardware(
            name, **numbers, efficiency=efficiency, contested=str(entry.get("contested", "")), capability=capability
        )

    def _efficiency(self, name: str) -> Efficiency:
        if name not in self.efficiencies:
            raise ConfigError(f"hardware: efficiency: {name!r} is not one of {', '.join(self.efficiencies)}.")
        entry = self._resolve(self.efficiencies, name, "efficiencies")
        tables = {
            key: {part: _positive(entry.get(key, {}), part, f"{name}: {key}") for part in parts}
            for key, parts in _TABLES.items()
        }
        sizes = sorted((int(key), _positive(self.size, key, "size")) for key in self.size)
        memory, permute = (_positive(entry, key, name) for key in ("memory", "permute"))
        return Efficiency(memory=memory, permute=permute, size=tuple(sizes), **tables)

    def _resolve(self, table: dict[str, dict[str, Any]], name: str, section: str) -> dict[str, Any]:
        """The entry with what it does not give itself taken from the one that `like` names, and so on."""
        entry, seen = table[name], [name]
        while "like" in entry:
            base = str(entry["like"])
            if base not in table or base in seen:
                raise ConfigError(f"hardware: {section}: {name}: like: {base!r} names no other entry.")
            seen.append(base)
            own = {key: value for key, value in entry.items() if key != "like"}
            inherited = {key: value for key, value in table[base].items() if key not in ("names", "contested")}
            entry = _merged(inherited, own)
        return entry


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, one level deep as well."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _positive(entry: dict[str, Any], key: str, name: str) -> float:
    number = entry.get(key)
    if not isinstance(number, _Number):
        problem = "a number is missing" if number is None else f"expected a number, got {shown(number)}"
        raise ConfigError(f"hardware: {name}: {key}: {problem}.")
    zero_is_allowed = key in ("bf16", "fp16", *PRECISIONS)  # the card has no such units
    if not math.isfinite(number.value) or number.value < 0 or (number.value == 0 and not zero_is_allowed):
        raise ConfigError(f"{number.place}: {name}: {key}: must be a positive number, got {number.value:g}.")
    return number.value


@functools.cache
def _packaged() -> dict[str, Any]:
    text = (importlib.resources.files(__package__) / FILE).read_text("utf-8")
    return _mapping(_plain(read_mapping(text, FILE), FILE), FILE)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found. It is the file with your own hardware table; check the path.") from None
    return _mapping(_plain(read_mapping(text, str(path)), str(path)), str(path))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = f"{value.value:g}" if isinstance(value, _Number) else shown(value)
        raise ConfigError(f"{where}: expected `key: value` lines, got {found}.")
    return value


def _plain(value: Any, place: str) -> Any:
    """The tree with dictionaries for mappings and _Number for a number or a [number, source]."""
    if isinstance(value, Pairs):
        return {
            key: [str(name) for name in inner] if key == "names" and isinstance(inner, list) else _plain(inner, where)
            for key, inner, where in value.items
        }
    has_source = isinstance(value, list) and len(value) == 2
    text = value[0] if has_source else value
    if isinstance(text, Scalar | str):
        try:
            number = float(parse_number(str(text)))  # text as well: YAML 1.1 does not know 85e9 as a number
        except ValueError:
            if isinstance(text, Scalar) or has_source:
                raise ConfigError(f"{place}: expected a number, got {shown(text)}.") from None
            return text
        return _Number(number, str(value[1]) if has_source else "the user's file", place)
    raise ConfigError(f"{place}: expected a number or [number, source], got {shown(value)}.")
