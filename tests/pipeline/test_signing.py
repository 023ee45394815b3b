"""Signed manifests: with a key in the environment only what was written with it is opened."""

import json
import shutil
from pathlib import Path

import pytest
from tests.pipeline.small_data import small_config
from tests.pipeline.test_publish import unasked, write_export

from shardrec.pipeline.checkpoint.store import Checkpoints
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.outputs.signing import KEY, SignatureError, require_signature, signed
from shardrec.pipeline.publish import publish
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import train

FIRST, SECOND = "a key of many bytes" * 2, "another key of many bytes"


def test_a_signature_covers_every_value_and_no_other_key(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"b": [1, 2.5, None], "a": {"x": float("nan")}}
    assert signed(content) == content  # no key
    require_signature(content, "it")
    monkeypatch.setenv(KEY, FIRST)
    ours = json.loads(json.dumps(signed(content)))
    require_signature(ours, "it")
    require_signature({"signature": ours["signature"], "a": ours["a"], "b": ours["b"]}, "it")
    for changed in (ours | {"b": [1, 2.5, 0]}, ours | {"c": 1}, ours | {"signature": 7}, content):
        with pytest.raises(SignatureError, match=f"it must have a signature by the key in {KEY}"):
            require_signature(changed, "it")
    monkeypatch.setenv(KEY, SECOND)
    with pytest.raises(SignatureError, match="got another"):
        require_signature(ours, "it")


@pytest.mark.parametrize("key", ["", "short"])
def test_a_short_key_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ValueError, match=f"{KEY} must have at least 16 bytes, got {len(key)}"):
        signed({})


def test_a_pointer_is_opened_only_with_its_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer, export = tmp_path / "published.json", write_export(tmp_path / "monday", "monday")
    publish(unasked(export, pointer))
    monkeypatch.setenv(KEY, FIRST)
    with pytest.raises(SignatureError, match=r"monday/manifest.json must have a signature"):
        publish(unasked(export, tmp_path / "other.json"))
    manifest = Path(export) / "manifest.json"
    manifest.write_text(json.dumps(signed(json.loads(manifest.read_text()))))
    with pytest.raises(SignatureError, match=r"published.json must have a signature .* got none"):
        publish(unasked(export, pointer))
    pointer.unlink()
    publish(unasked(export, pointer))
    assert "signature" in json.loads(pointer.read_text())
    assert not publish(unasked(export, pointer)).is_new
    moved = pointer.read_text().replace('"monday"', '"sunday"')
    pointer.write_text(moved)
    with pytest.raises(SignatureError, match=r"published.json must have a signature .* another"):
        Recommender.open(pointer)


@pytest.mark.slow
def test_a_run_and_its_export_are_opened_only_with_the_key_they_were_written_with(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, FIRST)
    config = small_config(data, tmp_path / "run")
    train(config)
    out = ExportConfig(run=config.output, prepared=data, output=str(tmp_path / "out"))
    export(out)
    assert not export(out).is_new
    expected = Recommender.open(tmp_path / "out").recommend([[3, 9]], k=3)
    assert FIRST not in "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )
    monkeypatch.setenv(KEY, SECOND)
    with pytest.raises(SignatureError, match="got another"):
        Recommender.open(tmp_path / "out")
    with pytest.raises(SignatureError, match=r"step-\d+/manifest.json must have a signature"):
        Checkpoints(tmp_path / "run" / "checkpoints", None).find("best")
    with pytest.raises(SignatureError, match="got another"):
        export(out)
    monkeypatch.delenv(KEY)
    assert Recommender.open(tmp_path / "out").recommend([[3, 9]], k=3) == expected
    shutil.rmtree(tmp_path / "out")
    assert evaluate(config.output, data)["metrics"] and export(out).is_new
