"""Ways to spoil a file, at random: what disks, copies and people do to files that we read back."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = (10**12, 2**31, 2**63, 10**4000, -1, 1e308, 0)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    "x",
    "",
    [],
    {},
    1.5,
    "../../outside",
    "/etc/passwd",
    "a\0b",
    "NaN",
)


def flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 50)) if content else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def extended(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.choice((1, 8, 5000)))


def swapped(content: bytes, chance: random.Random) -> bytes:
    """Two blocks change places."""
    size = max(1, len(content) // chance.choice((3, 10, 100)))
    first, second = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    a, b = content[first : first + size], content[second : second + size]
    return content[:first] + b + content[first + size : second] + a + content[second + size :]


def zeroed(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    size = min(chance.choice((1, 16, 4096)), len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def changed_json(content: bytes, chance: random.Random) -> bytes:
    """One value of a JSON text is another: huge, of another type, a path, or gone."""
    try:
        value = json.loads(content)
    except ValueError:
        return flipped(content, chance)
    places = list(_places(value))
    if not places:
        return b"[]"
    parent, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1:
        parent[key] = chance.choice(HUGE)
    elif kind == 2:
        other, place = chance.choice(places)
        parent[key] = json.loads(json.dumps(other[place]))
    else:
        parent[key] = chance.choice(OTHERS)
    return _text(value)


def key_given_twice(content: bytes, chance: random.Random) -> bytes:
    start = content.find(b"{") + 1
    name = content[start:].partition(b":")[0]
    return content[:start] + name + b': "other",' + content[start:]


def nested(content: bytes, chance: random.Random) -> bytes:
    depth = chance.choice((60, 2000, 200_000))
    opened, closed = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opened * depth + content + closed * depth


CONTENTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flipped, flipped, truncated, extended, swapped, zeroed),
    *(changed_json, changed_json, changed_json, changed_json, key_given_twice, nested),
)


def spoil(path: Path, outside: Path, chance: random.Random) -> str:
    """Spoil one file; returns how, in words."""
    way = chance.randrange(14)
    if way == 0:
        path.unlink()
        return "removed"
    if way == 1:
        path.unlink()
        path.mkdir()
        return "a folder"
    if way == 2:
        path.unlink()
        os.mkfifo(path)
        return "a pipe"
    if way == 3:
        path.unlink()
        path.symlink_to(outside)
        return "a link that leads out"
    if way == 4:
        shutil.copy(chance.choice([p for p in path.parent.rglob("*") if p.is_file()]), f"{path}.x")
        os.replace(f"{path}.x", path)
        return "another file"
    change = chance.choice(CONTENTS)
    path.write_bytes(change(path.read_bytes(), chance))
    return change.__name__


def _places(value: Any) -> Any:
    """Each container in a JSON value, with each of its keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, one in list(pairs):
            yield value, key
            if isinstance(one, dict | list):
                yield from _places(one)


def _text(value: Any) -> bytes:
    """JSON, with whole numbers of any length."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(before)
