"""Mutated configuration files and command lines: each becomes a Config or a ConfigError, within seconds."""

import json
import random
import time
from pathlib import Path

import pytest

from erniekit.config import Config, load, schema
from erniekit.config.compat_keys import RULES
from erniekit.utils.errors import ConfigError

SEED = 20240601
REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "examples" / "configs").rglob("*.yaml"))
PIECES = (
    *": - [ ] { } & * &a *a !!int !!python/object:x ! % @ ` ' # ? , > | ... --- ~ null .nan 1e999 0x1F 010".split(),
    *r"1:30 1_000 ${ ${a} ${oc.env:HOME} ${seed} $${ } $HOME ~/x \ud800 \ 数据".split(),
    *(
        "<<: *a\n",
        '"',
        " ",
        "\t",
        "\n",
        "\r",
        "\0",
        "\x85",
        "\u2028",
        "\ufeff",
        "...\n",
        "%YAML 1.1\n---",
        "\U0001f600",
    ),
    "9" * 500,
)
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1e308,
    10**30,
    "",
    "x" * 300,
    "~",
    "${seed}",
    "$x",
    [],
    [1, "a"],
    {},
    {"a": {"b": [1]}},
]
KEYS = [*schema.fields(), *RULES, "lora_config", "r", "bias", "lr", "dataset", "x_args"]


def outcome(path: str | None, words: list[str] | dict[str, object] | None) -> str:
    """What loading comes to; anything but a Config and a ConfigError fails the test by itself."""
    started = time.process_time()
    try:
        cfg = load(path, words, "version")
        assert isinstance(cfg, Config)
        found = "read"
    except ConfigError as error:
        message = str(error)
        assert message and "\nTraceback" not in message
        message.encode("utf-8", "backslashreplace")
        found = "refused"
    assert time.process_time() - started < 5
    return found


def mutated(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 4)):
        where = draw.randrange(len(text) + 1)
        until = min(len(text), where + draw.choice((0, 0, 1, 3, 20)))
        piece = draw.choice((draw.choice(PIECES), text[where : where + draw.randint(1, 40)] * draw.randint(1, 3)))
        text = text[:where] + piece + text[until:]
    return text


@pytest.fixture(scope="module")
def seeds() -> list[str]:
    short = [path.read_text(encoding="utf-8") for path in SHIPPED]
    own = (
        "a_args: &a\n  seed: 5\n  max_steps: 10\nb_args:\n  <<: *a\n  seed: 5\noutput_dir: ${oc.env:HOME}/x\n"
        "train_dataset_path: [a.jsonl, '~/b.jsonl']\nlora_config: {r: 8, target_modules: [q_proj], bias: none}\n"
    )
    return [*sorted(short, key=len)[:8], own, own, own]


def test_mutated_yaml(seeds: list[str], tmp_path: Path):
    draw, path = random.Random(SEED), tmp_path / "x.yaml"
    counts = {"read": 0, "refused": 0}
    for _ in range(1500):
        data = mutated(draw.choice(seeds), draw).encode("utf-8", "surrogatepass")
        if draw.random() < 0.1:
            at = draw.randrange(len(data))
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        path.write_bytes(data)
        counts[outcome(str(path), None)] += 1
    assert min(counts.values()) > 100, counts


def test_mutated_json(tmp_path: Path):
    draw, path = random.Random(SEED), tmp_path / "x.json"
    counts = {"read": 0, "refused": 0}
    for _ in range(1500):
        given = {draw.choice(KEYS): draw.choice(VALUES) for _ in range(draw.randint(1, 2))}
        text = json.dumps(given, ensure_ascii=draw.random() < 0.5)
        path.write_text(mutated(text, draw) if draw.random() < 0.5 else text, encoding="utf-8", errors="surrogatepass")
        counts[outcome(str(path), None)] += 1
    assert min(counts.values()) > 100, counts


def test_random_values_of_every_key():
    draw = random.Random(SEED)
    for name in KEYS:
        for value in draw.sample(VALUES, 4):
            outcome(None, {name: value})


def test_random_words():
    draw = random.Random(SEED)
    counts = {"read": 0, "refused": 0}
    for _ in range(3000):
        words = []
        for _ in range(draw.randint(1, 3)):
            name, piece = draw.choice(KEYS), draw.choice((*PIECES, "1", "true", "[a, b]", "{a: 1}", "'x'", "\udce9"))
            words += draw.choice(
                ([f"{name}={piece}"], [f"--{name}", piece], [f"--{name}={piece}"], [f"--{name}"], [piece])
            )
        counts[outcome(None, words)] += 1
    assert min(counts.values()) > 100, counts
