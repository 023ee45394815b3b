"""Exports that somebody has tampered with: files, and the manifest's checksums with them."""

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardrec.modules.encoder import EncoderConfig, TransformerEncoder
from shardrec.pipeline.served.encoder_file import write_encoder

OLD_EXPORT = Path(__file__).with_name("written_by_c53ea15") / "export"


class Touch:
    """Unpickled, it makes a file: the harmless twin of any command."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return open, (self.path, "w")


def own_export(folder: Path) -> Path:
    """An export of an encoder of this package, made from the stored one."""
    shutil.copytree(OLD_EXPORT, folder)
    (folder / "encoder.pt2").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    width, length = manifest["width"], manifest["max_length"]
    encoder = TransformerEncoder(EncoderConfig(width=width, max_length=length, kind="modern"))
    name, config = write_encoder(folder, encoder, width, length)
    files = [e for e in manifest["files"] if e["path"] != "encoder.pt2"] + [{"path": name}]
    reseal(folder, files=files, encoder=config)
    return folder


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest fit the files again, as an attacker does; ``changes`` are keys of it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    for entry in manifest["files"]:
        content = (folder / entry["path"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def change_archive(
    path: Path, change: Callable[[str, bytes], bytes], more: Mapping[str, bytes]
) -> None:
    """Rewrite a zip archive: ``change`` of every file, and ``more`` files."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(files)).partition("/")[0]
    files = {name: change(name.partition("/")[2], content) for name, content in files.items()}
    files |= {f"{top}/{name}": content for name, content in more.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def pickled_inputs(path: Path, marker: Path) -> None:
    """A pickle as the sample inputs."""
    evil = pickle.dumps(Touch(marker))
    change_archive(path, lambda name, old: evil if "sample_inputs" in name else old, {})


def pickled_weight(path: Path, marker: Path) -> None:
    """A weight that says it is pickled."""
    evil = pickle.dumps(Touch(marker))

    def change(name: str, old: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            return old.replace(b'"use_pickle": false', b'"use_pickle": true')
        return evil if name.rpartition("/")[2] == "weight_0" else old

    change_archive(path, change, {})


def opaque_constant(path: Path, marker: Path) -> None:
    """A constant of Python."""
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    config = json.dumps({"config": {"evil": entry | {"tensor_meta": None}}}).encode()

    def change(name: str, old: bytes) -> bytes:
        return config if name.endswith("model_constants_config.json") else old

    evil = pickle.dumps(Touch(marker))
    change_archive(path, change, {"data/constants/opaque_obj_0": evil})


def expression(path: Path, marker: Path) -> None:
    """A size that is an expression of Python."""
    evil = f"open({str(marker)!r}, 'w')"

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: evil if k == "expr_str" else changed(one) for k, one in value.items()}
        return [changed(one) for one in value] if isinstance(value, list) else value

    def change(name: str, old: bytes) -> bytes:
        return json.dumps(changed(json.loads(old))).encode() if name.endswith("model.json") else old

    change_archive(path, change, {})


ATTACKS = {
    one.__name__: one for one in (pickled_inputs, pickled_weight, opaque_constant, expression)
}


def attacked(attack: str, base: Path) -> tuple[Path, Path]:
    """An export whose encoder runs code when PyTorch opens it, and the file that the code makes."""
    folder, marker = base / "export", base / "the-code-ran"
    shutil.copytree(OLD_EXPORT, folder)
    ATTACKS[attack](folder / "encoder.pt2", marker)
    reseal(folder)
    return folder, marker
