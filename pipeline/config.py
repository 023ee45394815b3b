"""Convert nested frozen dataclasses to JSON and back, and apply ``dotted.name=value`` overrides.

A field may be annotated with a union of dataclasses (say ``CCE | CCEMinus``). Its members are then
chosen by their class name in snake case (``cce_minus``), stored in JSON under the key ``type``.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.outputs.addresses import without_keys

Config = TypeVar("Config")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def to_json(config: Any) -> Any:
    """The config as dicts, lists, strings, numbers, booleans and None.

    Args:
        config: a dataclass instance; its leaves are JSON values, or tuples of them.

    Returns:
        What ``json.dumps`` takes and ``from_json`` reads back to an equal config.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return [to_json(value) for value in config] if isinstance(config, tuple) else config
    annotations = typing.get_type_hints(type(config))
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        stored = to_json(value)
        if len(_choices(annotations[field.name])) > 1 and dataclasses.is_dataclass(value):
            stored = {"type": snake_case(type(value).__name__)} | stored
        result[field.name] = stored
    return result


def from_json(cls: type[Config], data: Mapping[str, Any], name: str = "config") -> Config:
    """A ``cls`` from what ``to_json`` wrote; missing fields take their defaults.

    Args:
        cls: the dataclass to build.
        data: its fields.
        name: dotted name of this part, for error messages.

    Raises:
        ValueError: a key is unknown (similar names are listed) or missing, or a value is out of
            range.
        TypeError: a value has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{name} must be a table of options, got {data!r}; set its fields")
    annotations = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ValueError(unknown_name(f"option of {name}", key, names))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in data and _is_required(field):
            raise ValueError(f"{name}.{field.name} must be set, got nothing; it has no default")
    return cls(**{key: _read(annotations[key], data[key], f"{name}.{key}") for key in data})


def override(config: Config, assignments: Sequence[str]) -> Config:
    """A copy of ``config`` with leaves set from ``dotted.name=text``.

    A union of dataclasses is switched by name (``loss=cce_minus``) before its fields are set,
    whatever the order given; checks run once, on the complete result.

    Args:
        config: a dataclass instance.
        assignments: such as ``["loss=sce", "loss.num_buckets=64"]``.

    Raises:
        ValueError: an assignment has no "=", names no option (similar names are listed) or has an
            invalid value.
    """
    data = to_json(config)
    pairs = [_split(assignment) for assignment in assignments]
    for name, text in sorted(pairs, key=lambda pair: pair[0].count(".")):
        _assign(type(config), data, name, text)
    return from_json(type(config), data)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted name and value for every leaf, in the order of declaration.

    It is meant for display: access keys in addresses are removed.
    """
    for name, value in to_json(config).items() if not isinstance(config, dict) else config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, without_keys(value) if isinstance(value, str) else value


def describe(config: Any) -> str:
    """The complete config as text, one ``dotted.name = value`` per line."""
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in flatten(config))


def describe_changes(config: Any) -> str:
    """The options that differ from their default or have none, as text like ``describe``."""
    lines = (f"{name} = {json.dumps(value)}" for name, value in _changes(config))
    return without_keys("\n".join(lines))


def type_names(annotation: Any) -> list[str]:
    """The values that a field of this type may have, as words for messages and help.

    Example:
        >>> type_names(int | None), type_names(typing.Literal["a", "b"] | tuple[int, ...])
        (['none', 'int'], ["'a'", "'b'", 'int,int,…'])
    """
    names: list[str] = []
    for kind in _members(annotation):
        if typing.get_origin(kind) is typing.Literal:
            names += [repr(value) for value in typing.get_args(kind)]
        elif _is_tuple(kind):
            items = [_allowed(item) for item in typing.get_args(kind) if item is not Ellipsis]
            names.append(
                ",".join([*items * 2, "…"] if Ellipsis in typing.get_args(kind) else items)
            )
        else:
            names.append("none" if kind is type(None) else getattr(kind, "__name__", str(kind)))
    return names


def snake_case(name: str) -> str:
    """A class name in snake case.

    Example:
        >>> snake_case("CCEMinus"), snake_case("InBatch"), snake_case("GBCE")
        ('cce_minus', 'in_batch', 'gbce')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def parse(annotation: Any, text: str, name: str) -> Any:
    """The value of a field of type ``annotation`` that a user typed as ``text``.

    Args:
        annotation: bool, int, float, str, Literal, a tuple or a union of these with None.
        text: what the user typed, such as ``1_000_000``, ``1e-3``, ``none``, ``0.9,0.98``.
        name: dotted name of the field, for error messages.

    Raises:
        ValueError: the text is not a value of this type.
    """
    readers = {bool: _parse_bool, int: _parse_int, float: float, str: str}
    for kind in _members(annotation):
        try:
            if kind is type(None) and text.lower() in ("none", "null"):
                return None
            if typing.get_origin(kind) is typing.Literal:
                return _parse_literal(kind, text)
            if _is_tuple(kind):
                return _parse_tuple(kind, text, name)
            if kind in readers:
                return readers[kind](text)  # type: ignore[operator]
        except ValueError:
            continue
    raise ValueError(f"{name} must be {_allowed(annotation)}, got {text!r}; fix it")


def _changes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    stored = to_json(config)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        is_made = field.default_factory is not dataclasses.MISSING
        default: Any = field.default_factory() if is_made else field.default  # type: ignore[operator]
        if not dataclasses.is_dataclass(value):
            if value != default:
                yield name, stored[field.name]
        elif type(value) is type(default):
            yield from _differences(value, default, f"{name}.")
        else:
            if "type" in stored[field.name]:
                yield name, stored[field.name]["type"]
            yield from _changes(value, f"{name}.")


def _differences(config: Any, default: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    before = dict(flatten(default))
    for name, value in flatten(config):
        if value != before.get(name):
            yield prefix + name, value


def _split(assignment: str) -> tuple[str, str]:
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise ValueError(f"an override must read name=value, got {assignment!r}; use loss=sce")
    return name.strip(), text.strip()


def _assign(cls: Any, data: dict[str, Any], name: str, text: str) -> None:
    """Set one leaf, or switch one union, in the JSON form ``data`` of a ``cls``."""
    known = [leaf for leaf, _ in flatten(data) if not leaf.endswith(".type")]
    *parents, leaf = name.split(".")
    for parent in parents:
        annotation = typing.get_type_hints(cls).get(parent)
        choices = _choices(annotation)
        if not choices or not isinstance(data.get(parent), dict):
            raise ValueError(unknown_name("option", name, known))
        cls, data = choices[data[parent].get("type", next(iter(choices)))], data[parent]
    hints = typing.get_type_hints(cls)
    annotations = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if leaf not in annotations:
        # A union that was just switched has no values yet, so its leaves are not among `known`.
        leaves = [key for key in annotations if len(_choices(annotations[key])) != 1]
        names = dict.fromkeys([*known, *(".".join((*parents, key)) for key in leaves)])
        raise ValueError(unknown_name("option", name, list(names)))
    data[leaf] = _value(annotations[leaf], text, name)


def _value(annotation: Any, text: str, name: str) -> Any:
    choices = _choices(annotation)
    if not choices or text.lower() in ("none", "null"):
        return to_json(parse(annotation, text, name))
    if len(choices) == 1:
        fields = ", ".join(field.name for field in dataclasses.fields(next(iter(choices.values()))))
        raise ValueError(f"{name} must be set by its fields, got {text!r}; they are {fields}")
    if text not in choices:
        raise ValueError(unknown_name(name, text, list(choices)))
    return {"type": text}


def _read(annotation: Any, value: Any, name: str) -> Any:
    choices = _choices(annotation)
    if isinstance(value, Mapping) and choices:
        kind = value.get("type", next(iter(choices))) if len(choices) > 1 else next(iter(choices))
        if kind not in choices:
            raise ValueError(unknown_name(name, str(kind), list(choices)))
        fields = {key: item for key, item in value.items() if key != "type" or len(choices) == 1}
        return from_json(choices[kind], fields, name)
    for kind in _members(annotation):
        if _is_tuple(kind) and isinstance(value, list | tuple):
            return tuple(
                _read(item, one, name)
                for item, one in zip(_items(kind, len(value)), value, strict=True)
            )
        if _fits(kind, value):
            return _as_float(value, name) if kind is float else value
    raise TypeError(f"{name} must be {_allowed(annotation)}, got {value!r}; fix the config")


def _as_float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be below 2**1024, got {str(value)[:12]}...; fix the config"
        ) from None


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, None first; any other annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(annotation), key=lambda kind: kind is not type(None)))
    return (annotation,)


def _choices(annotation: Any) -> dict[str, type]:
    """The dataclasses an annotation allows, by their names in snake case."""
    kinds = [kind for kind in _members(annotation) if dataclasses.is_dataclass(kind)]
    return {snake_case(kind.__name__): kind for kind in kinds}  # type: ignore[misc,union-attr]


def _is_tuple(kind: Any) -> bool:
    origin: Any = typing.get_origin(kind)
    return origin is tuple


def _items(kind: Any, length: int) -> list[Any]:
    arguments = typing.get_args(kind)
    return [arguments[0]] * length if arguments[-1] is Ellipsis else list(arguments)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


def _parse_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _parse_int(text: str) -> int:
    if "e" in text.lower() and float(text).is_integer():
        return int(float(text))
    return int(text)


def _parse_literal(kind: Any, text: str) -> Any:
    for value in typing.get_args(kind):
        if str(value) == text:
            return value
    raise ValueError(text)


def _parse_tuple(kind: Any, text: str, name: str) -> tuple[Any, ...]:
    parts = _split_texts(text) if str in typing.get_args(kind) else _split_values(text)
    items = _items(kind, len(parts))
    if len(items) != len(parts):
        raise ValueError(text)
    return tuple(parse(item, part, name) for item, part in zip(items, parts, strict=True))


def _split_values(text: str) -> list[str]:
    return [part.strip() for part in text.strip("()[]").split(",") if part.strip()]


def _split_texts(text: str) -> list[str]:
    """Texts between commas without outer blanks; those in double quotes exactly as they are.

    Example:
        >>> _split_texts('buy, [click],"add,to,cart"," view "')
        ['buy', '[click]', 'add,to,cart', ' view ']
    """
    quoted = r'"(?:[^"]|"")*"'
    parts = re.findall(rf"\s*({quoted}|[^,]*)\s*(?:,|$)", text)
    words = (
        part[1:-1].replace('""', '"') if re.fullmatch(quoted, part) else part.strip()
        for part in parts
    )
    return [word for word in words if word]


def _allowed(annotation: Any) -> str:
    return " or ".join(type_names(annotation))
