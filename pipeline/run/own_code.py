"""User-supplied encoders and callbacks, named as ``package.module:Class`` in the config.

Every rank imports the name, so that `shardrec launch`, evaluate and export find it too. From a
stored config, only subclasses of ``torch.nn.Module`` are constructed: a run folder from elsewhere
cannot have any other function called.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardrec.pipeline.config import parse
from shardrec.pipeline.near_names import unknown_name

if TYPE_CHECKING:
    from torch import nn

    from shardrec.pipeline.run.callbacks import Callback
    from shardrec.pipeline.run.config import TrainConfig

__all__ = ["own_callbacks", "own_encoder", "with_own_encoder"]

REMEDY = "name an installed one, or set PYTHONPATH to the folder that holds its package"


def own_encoder(config: "TrainConfig") -> "nn.Module | None":
    """The module that the config names, with random weights from its seed; None if it names none.

    The constructor gets ``own_encoder.options``, and every option of ``encoder`` for which it has a
    parameter: ``width``, usually ``max_length``.

    Raises:
        TypeError: it is not a class of ``torch.nn.Module``.
        ValueError: it cannot be imported, or an option is unknown, missing or of another type.
    """
    if config.own_encoder.module is None:
        return None
    import torch
    from torch import nn

    found = _imported("encoder", config.own_encoder.module)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(
            f"encoder must be a class of torch.nn.Module, got {config.own_encoder.module} "
            f"({type(found).__name__}); name a class"
        )
    given = _arguments(found, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return found(**given)
        except TypeError as error:
            raise TypeError(
                f"{found.__name__} must take what it is given ({', '.join(given)}), got {error}; "
                "set what is missing as encoder.NAME=VALUE"
            ) from error


def own_callbacks(names: Iterable[str]) -> "list[Callback]":
    """New callbacks: the results of calling each named class or function without arguments.

    Raises:
        TypeError: a name cannot be called without arguments.
        ValueError: a name cannot be imported.
    """
    return [_made(name) for name in names]


def with_own_encoder(assignments: Sequence[str]) -> list[str]:
    """The assignments, with ``encoder=package.module:Class`` expanded.

    ``encoder.NAME=VALUE`` is then an option of the class, unless ``encoder`` has an option NAME.

    Example:
        >>> with_own_encoder(["encoder=my.net:GRU", "encoder.layers=2", "encoder.width=8"])
        ['own_encoder.module=my.net:GRU', 'encoder.width=8', 'own_encoder.options=layers=2']
    """
    from shardrec.modules.encoder import EncoderConfig

    known = {f"encoder.{field.name}" for field in dataclasses.fields(EncoderConfig)}
    is_named = any(one.startswith("encoder=") and ":" in one for one in assignments)
    if not is_named:
        return list(assignments)
    written, options = [], []
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name == "encoder":
            written.append(f"own_encoder.module={value}")
        elif name.startswith("encoder.") and name not in known:
            own = assignment.removeprefix("encoder.")
            options.append(f'"{own}"' if "," in own else own)
        else:
            written.append(assignment)
    return [*written, *([f"own_encoder.options={','.join(options)}"] if options else [])]


def _arguments(found: type, config: "TrainConfig") -> dict[str, Any]:
    """The arguments of the constructor, by name."""
    parameters = inspect.signature(found).parameters
    sizes = dataclasses.asdict(config.encoder)
    given = {name: sizes[name] for name in parameters if sizes.get(name) is not None}
    for option in config.own_encoder.options:
        name, equals, text = option.partition("=")
        if not equals or name not in parameters:
            raise ValueError(unknown_name(f"option of {found.__name__}", name, list(parameters)))
        given[name] = _read(parameters[name], text, f"encoder.{name}")
    missing = [name for name, one in parameters.items() if _is_needed(one) and name not in given]
    if missing:
        raise ValueError(
            f"{found.__name__} must get all of its arguments, got none for {', '.join(missing)}; "
            f"set encoder.{missing[0]}=…"
        )
    return given


def _read(parameter: inspect.Parameter, text: str, name: str) -> Any:
    """The text as the type of the parameter, which its annotation or else its default says."""
    kind = parameter.annotation
    if kind is inspect.Parameter.empty or isinstance(kind, str):
        named: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
        has_default = parameter.default not in (inspect.Parameter.empty, None)
        by_default = type(parameter.default) if has_default else str
        kind = named.get(str(kind), by_default)
    return parse(kind, text, name)


def _is_needed(parameter: inspect.Parameter) -> bool:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in several


def _made(name: str) -> "Callback":
    make: Callable[[], Callback] = _imported("callbacks", name)
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"callbacks must be classes or functions that need no arguments, got {name} ({error}); "
            "name a function that makes one"
        ) from error
    return make()


def _imported(what: str, name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"{what} must be package.module:Class, got {name!r}; put a colon before the class"
        )
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} must name a module that can be imported, got {module} ({error}); {REMEDY}"
        ) from error
    if not hasattr(loaded, attribute):
        known = [one for one in vars(loaded) if not one.startswith("_")]
        raise ValueError(unknown_name(f"{what} in {module}", attribute, known))
    return getattr(loaded, attribute)
