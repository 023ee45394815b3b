"""The encoder of an export: weights of our own encoder, or a ``torch.export`` program.

Our own encoder is stored as its weights, in safetensors, and its config, in the manifest. It is
rebuilt from this package, so opening it runs no code of the file. Any other module can only be
stored as a program. PyTorch unpickles and evaluates parts of that file, so it can run arbitrary
code when it is opened: this needs an explicit ``trust_code``.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from shardrec.modules.encoder import EncoderConfig, TransformerEncoder
from shardrec.pipeline.config import from_json, to_json

__all__ = [
    "PROGRAM",
    "WEIGHTS",
    "export_program",
    "inputs",
    "read_encoder",
    "reads_lengths",
    "require_trust",
    "write_encoder",
]

WEIGHTS, PROGRAM = "encoder.safetensors", "encoder.pt2"
_REMEDY = "export the run again"


def write_encoder(
    folder: Path, encoder: nn.Module, width: int, max_length: int
) -> tuple[str, dict[str, Any] | None]:
    """Write an encoder; returns the name of its file, and its config if it is our own.

    Args:
        folder: folder to write the file to.
        encoder: module from (B, L, D) to (B, L, D); not modified.
        width: D.
        max_length: the longest L.

    Raises:
        ValueError: it is not our own, and ``torch.export`` cannot trace it.
    """
    if type(encoder) is not TransformerEncoder:
        torch.export.save(export_program(encoder, width, max_length), folder / PROGRAM)
        return PROGRAM, None
    tensors = {name: value.detach().cpu().contiguous() for name, value in _tensors(encoder).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    return WEIGHTS, to_json(encoder.config)


def export_program(encoder: nn.Module, width: int, max_length: int) -> torch.export.ExportedProgram:
    """The encoder as a ``torch.export`` program: CPU, float32, any B and any L.

    Args:
        encoder: module from (B, L, D) to (B, L, D) that also takes (B,) lengths if it
            ``reads_lengths``; not modified.
        width: D.
        max_length: the longest L.

    Raises:
        ValueError: ``torch.export`` cannot trace it.
    """
    alone = copy.deepcopy(encoder).cpu().eval()
    batch = torch.export.Dim("batch", min=1)
    dims: list[dict[int, Any]] = [{0: batch}, {0: batch}]
    if max_length > 1:
        dims[0][1] = torch.export.Dim("length", min=1, max=max_length)
    example = inputs(alone, torch.zeros(3, min(max_length, 5), width), torch.ones(3).long())
    try:
        return torch.export.export(alone, example, dynamic_shapes=tuple(dims[: len(example)]))
    except Exception as error:
        raise ValueError(
            f"encoder must be one that torch.export can trace for any number and length of "
            f"sequences, got {type(encoder).__name__} and {type(error).__name__}: {error}; "
            "remove branches on values and fixed sizes from its forward"
        ) from error


def reads_lengths(encoder: nn.Module) -> bool:
    """Whether an encoder also takes the (B,) lengths of its sequences."""
    return isinstance(encoder, TransformerEncoder) and encoder.reads_lengths


def inputs(encoder: nn.Module, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """The arguments of an encoder: (B, L, D) vectors, and (B,) lengths if it reads them."""
    return (vectors, lengths) if reads_lengths(encoder) else (vectors,)


def read_encoder(folder: Path, manifest: Mapping[str, Any], *, trust_code: bool) -> nn.Module:
    """The encoder of an export; the caller has checked the checksums of the files.

    Args:
        folder: the export.
        manifest: manifest of the export, which must list the encoder's file.
        trust_code: whether a program, which can run arbitrary code, may be opened.

    Raises:
        ValueError: the manifest lists no encoder, the encoder is a program that is not trusted, or
            its weights do not fit the config.
    """
    listed = {entry["path"] for entry in manifest["files"]}
    if WEIGHTS in listed:
        return _read_weights(folder / WEIGHTS, manifest)
    if PROGRAM not in listed:
        raise ValueError(
            f"the manifest of {folder} must list {WEIGHTS} or {PROGRAM}, got neither; {_REMEDY}"
        )
    require_trust(folder / PROGRAM, "a program of PyTorch", trust_code, _REMEDY)
    try:
        return torch.export.load(folder / PROGRAM).module()
    except Exception as error:  # of another release it can be anything, deep in torch
        wrote = manifest.get("versions", {}).get("torch", "an unknown release")
        raise ValueError(
            f"{folder / PROGRAM} must be of a torch that this one ({torch.__version__}) can read, "
            f"got one that {wrote} wrote ({type(error).__name__}: {error}); {_REMEDY} with this one"
        ) from error


def require_trust(path: Path, what: str, trust_code: bool, otherwise: str) -> None:
    """Refuse a file that can run code when it is opened, unless the caller trusts it.

    Raises:
        ValueError: ``trust_code`` is False.
    """
    if not trust_code:
        raise ValueError(
            f"{path} must be trusted to be opened, because {what} can run any code, got no "
            f"permission; {otherwise}, or, if you made this file or trust who did, allow it with "
            "trust_code=True (--trust-code)"
        )


def _tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that ``state_dict`` leaves out included."""
    return dict(encoder.named_parameters()) | dict(encoder.named_buffers())


def _read_weights(path: Path, manifest: Mapping[str, Any]) -> TransformerEncoder:
    try:
        stored = safetensors.torch.load(path.read_bytes())
        encoder = _empty_encoder(manifest, stored)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must hold the weights of the encoder in its manifest, got {error}; {_REMEDY}"
        ) from error
    for name, wanted in _tensors(encoder).items():
        owner, _, leaf = name.rpartition(".")
        value = stored[name]
        is_weight = isinstance(wanted, nn.Parameter)
        filled = nn.Parameter(value, requires_grad=False) if is_weight else value
        setattr(encoder.get_submodule(owner), leaf, filled)
    return encoder.eval()


def _empty_encoder(manifest: Mapping[str, Any], stored: Mapping[str, Tensor]) -> TransformerEncoder:
    """An encoder without memory, of the very names and shapes that ``stored`` has.

    Raises:
        TypeError, ValueError: config and tensors disagree.
    """
    config = from_json(EncoderConfig, manifest.get("encoder") or {}, "encoder")
    sizes = (config.width, config.max_length)
    if sizes != (manifest["width"], manifest["max_length"]):
        raise ValueError(f"another width or max_length than the manifest: {sizes}")
    # Sizes that the file cannot hold are refused before a module is built from them.
    num_values = sum(value.numel() for value in stored.values())
    largest = max(*sizes, config.resolved_hidden)
    if largest > num_values or config.num_blocks > len(stored):
        raise ValueError(f"{len(stored)} tensors with {num_values} values, too few for its config")
    with torch.device("meta"):
        encoder = TransformerEncoder(config)
    if manifest.get("reads_lengths", False) != encoder.reads_lengths:
        raise ValueError("another reads_lengths than the config has")
    if not all(value.isfinite().all() for value in stored.values()):
        raise ValueError("weights that are not finite")
    wanted, found = (_shapes(tensors) for tensors in (_tensors(encoder), stored))
    if wanted != found:
        differing = sorted(dict(wanted.items() ^ found.items()))[:3]
        raise ValueError(f"tensors that differ in name, shape or type: {', '.join(differing)}")
    return encoder


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}
