"""Damaged and hostile versions of good files, from a seeded generator."""

import copy
import json
import random
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    10**12,
    -(10**12),
    2**63,
    2**64,
    10**40,
    0.5,
    -0.0,
    1e-320,
    1e300,
    "",
    "x",
    "silu",
    "../../etc/passwd",
    "a\0b.safetensors",
    "\ud800",
    "model-00001-of-00002.safetensors",
    "x" * 5000,
    "(a+)+$",
    "[",
    "none",
    "float32",
    [],
    {},
    [1],
    [1, 2],
    [[0, 1], [1, 2]],
    [None],
    ["x"],
    [{}],
    {"a": 1},
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_theta": "x"},
    [2**62, 4],
    [0] * 100,
)
# In the place of a value, as text: what json.dumps does not write.
WRONG_TEXTS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "7" * 5000,
    "-0",
    "[" * 3000,
    '{"a":' * 3000,
    '"\\ud800"',
    "'x'",
    "",
)
_MARK = "\x01here\x01"


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below `content`."""
    found, level = [], [content]
    while level:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                level.append(holder[key])
    return found


def mutated_json(content: Any, rng: random.Random) -> bytes:
    """The JSON text of `content` with one to three faults: a value replaced, removed, moved, repeated or nested; a key
    removed, renamed, or there twice; or bytes damaged.
    """
    changed = copy.deepcopy(content)
    texts = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(changed)
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(9)
        if kind <= 3:
            holder[key] = copy.deepcopy(rng.choice(WRONG_VALUES))
        elif kind == 4:
            holder[key] = _MARK
            texts.append(rng.choice(WRONG_TEXTS))
        elif kind == 5:
            del holder[key]
        elif kind == 6:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else 0
        elif kind == 7 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "__metadata__", key + "s", key[::-1], "\ud800"))] = holder.pop(key)
        else:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"default": holder[key]}
    text = json.dumps(changed)
    for wrong in texts:
        text = text.replace(json.dumps(_MARK), wrong, 1)
    if rng.random() < 0.08 and ":" in text:  # the same key twice
        text = text.replace("{", "{" + text[1 : text.index(":")] + ": 1, ", 1)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        data = rng.choice((b"\xef\xbb\xbf" + data, data.decode("utf-8", "ignore").encode("utf-16")))
    return mutated_bytes(data, rng) if rng.random() < 0.1 else data


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes flipped, lost, added or repeated, or its end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, kind = rng.randrange(len(changed) + 1), rng.randrange(6)
        if kind == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[place : place + rng.choice((1, 1, 4, 40))]
        elif kind == 2:
            changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4))))
        elif kind == 3:
            changed[place:place] = changed[place : place + rng.choice((1, 8, 64))]
        elif kind == 4:
            del changed[place:]
        else:
            changed[place : place + 1] = rng.choice(
                (b'"', b"{", b"[", b"]", b"}", b",", b":", b"-", b"9", b"\0", b"\\")
            )
    return bytes(changed)
