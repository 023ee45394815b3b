"""Keys in addresses reach the store alone: no file, message, report or tracking store."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pipeline.object_store import inside, object_store
from tests.pipeline.small_data import prepare_small

from shardrec.launch.cli import main
from shardrec.pipeline.config import describe, flatten
from shardrec.pipeline.outputs.addresses import (
    clean,
    stored_without_keys,
    warn_of_keys,
    without_keys,
)
from shardrec.pipeline.outputs.storage import open_folder
from shardrec.pipeline.recipes import RECIPES
from shardrec.pipeline.run.config import CheckpointConfig


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:SECRET@bucket/run?region=eu", "s3://bucket/run?region=eu"),
        ("s3://KEY:SEC/RET+x=@bucket/run", "s3://bucket/run"),
        ("s3://KEY:SEC%2FRET@bucket", "s3://bucket"),
        ("http://SECRET@host:5000", "http://host:5000"),
        ("http://host/?token=SECRET", "http://host/"),
        ("s3://b?secret_key=SECRET&scheme=http&session_token=SECRET", "s3://b?scheme=http"),
        ("abfs://box/run?sv=2024&sig=SECRET", "abfs://box/run?sv=2024"),
        ("https://x/y?X-Amz-Signature=SECRET&X-Amz-Credential=SECRET", "https://x/y"),
        ("postgresql://me:SECRET@host:5432/runs", "postgresql://host:5432/runs"),
        ("s3://SECRET:@bucket/x", "s3://bucket/x"),
        (str(Path("s3://KEY:SECRET@bucket/x")), "s3:/bucket/x"),
    ],
)
def test_keys_are_left_out_wherever_an_address_stands(address: str, shown: str) -> None:
    assert without_keys(address) == shown
    message = f"cannot open '{address}', or \"{address}\"; see {address} too"
    assert without_keys(message) == f"cannot open '{shown}', or \"{shown}\"; see {shown} too"
    stored = stored_without_keys({"a": [address, 1, None], "b": {"c": address}})
    assert stored == {"a": [shown, 1, None], "b": {"c": shown}}


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/run?region=eu&scheme=http", "s3://bucket/path@home/x", "/data/a@b:c?d=e"),
        *("http://host:5000/a@b", "is it right? key=1", "did you mean 'x'?", "sqlite:///runs.db"),
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert without_keys(text) == text


def test_a_config_shows_no_keys_and_keeps_them() -> None:
    folder = CheckpointConfig(folder="s3://KEY:SECRET@bucket/run")
    config = RECIPES["demo"]("data", "run")
    config = dataclasses.replace(config, checkpoints=folder)
    assert "SECRET" not in describe(config) + str(dict(flatten(config)))
    assert config.checkpoints.folder == "s3://KEY:SECRET@bucket/run"


def test_the_retries_of_an_http_client_are_logged_without_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("urllib3.connectionpool")
    logger.addFilter(clean)
    try:
        logger.warning("Retrying after %s: %s", "an error", "/?token=SECRET/api/2.0")
    finally:
        logger.removeFilter(clean)
    assert "Retrying after an error" in caplog.text and "SECRET" not in caplog.text


def test_a_warning_says_where_keys_belong(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_keys("checkpoints.folder", "s3://KEY:SECRET@bucket/run")
        warn_of_keys("checkpoints.folder", "s3://bucket/run?region=eu")
        warn_of_keys("checkpoints.folder", None)
    assert caplog.text.count("checkpoints.folder holds keys") == 1
    assert "AWS_SECRET_ACCESS_KEY" in caplog.text and "SECRET@" not in caplog.text


@pytest.mark.parametrize("address", ["s3://KEY:SECRET@bucket/x?nonsense=1", "nix://K:SECRET@b/x"])
def test_an_address_that_nothing_opens_is_quoted_without_keys(address: str) -> None:
    with pytest.raises(ValueError, match="folder must be a path or an address") as caught:
        open_folder(address)
    error: BaseException | None = caught.value
    assert "SECRET" not in str(error)
    assert caught.value.__suppress_context__, "the traceback would show the keys"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store() as address:
        yield address.replace("key:secret@", "AKIDEXAMPLE:wJalrXUtnFEMI@")


def everything_written(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return "".join(path.read_bytes().decode("latin-1") for path in files)


@pytest.mark.slow
def test_a_run_with_keys_in_its_addresses_writes_and_prints_none_of_them(
    bucket: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = prepare_small(tmp_path / "data")
    where, store = inside(bucket, "keys"), f"sqlite:///{tmp_path}/runs.db?token=wJalrXUtnFEMI"
    words = ["train", "--prepared", data, "--run", str(tmp_path / "run"), "--recipe", "tiny_cpu"]
    options = ["limits.max_steps=4", f"checkpoints.folder={where}", "log_every=1"]
    assert main([*words, *options, f"mlflow.uri={store}"]) in (0, 2)
    assert (
        main([*words, *options, f"mlflow.uri=sqlite:///{tmp_path}/runs.db", "--resume=auto"]) == 0
    )
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert main(["evaluate", "--prepared", data, "--run", str(tmp_path / "run")]) == 0
    missing = bucket.replace("@runs/", "@no-such-bucket/")
    other = [*words[:4], str(tmp_path / "other"), *words[5:], f"checkpoints.folder={missing}"]
    assert main(other) != 0
    assert main(["prepare", "--events", missing, "--output", str(tmp_path / "p")]) != 0
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "checkpoints.folder holds keys" in printed and "s3://runs/keys" in printed
    stored = open_folder(where)
    for name in stored.folders():
        for file in ("state.json", "manifest.json", "metadata.json"):
            printed += (stored / name).read(file).decode()
    for secret in ("wJalrXUtnFEMI", "AKIDEXAMPLE"):
        assert secret not in everything_written(tmp_path) + printed
