"""An encoder and callbacks of the user's own, named on the command line, as far as the export."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.pipeline import own_net
from tests.pipeline.small_data import prepare_small, small_config

from shardrec.launch import cli
from shardrec.pipeline.config import override
from shardrec.pipeline.run.own_code import own_callbacks, own_encoder, with_own_encoder

NET = "own_net:GRUEncoder"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("data"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that PYTHONPATH names, with the module ``own_net``."""
    folder = tmp_path / "package"
    folder.mkdir()
    shutil.copy(own_net.__file__, folder / "own_net.py")
    monkeypatch.syspath_prepend(folder)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.chdir(tmp_path)
    return folder


def words(data: str, run: Path, *more: str) -> list[str]:
    small = ["--recipe", "tiny_cpu", "limits.max_steps=4", f"encoder={NET}", "encoder.layers=2"]
    return ["--prepared", data, "--run", str(run), *small, *more]


def test_a_run_with_an_encoder_by_name_is_evaluated_and_exported(
    data: str, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, where = tmp_path / "run", ["--prepared", data, "--run", str(tmp_path / "run")]
    assert cli.main(["train", *words(data, run, "callbacks=own_net:CountSteps")]) == 0
    assert (tmp_path / "steps").read_text() == "4"
    config = json.loads((run / "config.json").read_text())
    assert config["own_encoder"] == {"module": NET, "options": ["layers=2"]}
    assert json.loads((run / "run.json").read_text())["encoder"] == "GRUEncoder"
    assert cli.main(["evaluate", *where]) == 0
    assert cli.main(["recommend", *where, "--output", str(tmp_path / "lists")]) == 0
    # Without its callback, which changes no weights, the run is still the same one.
    assert cli.main(["train", *words(data, run, "--resume=auto")]) == 0
    assert cli.main(["train", *words(data, run, "--resume=auto", "encoder.hidden=4")]) == 2
    assert "encoder.hidden=4 for None" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_of_a_launch_finds_the_encoder(data: str, package: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    callback = "callbacks=own_net:CountSteps"
    assert cli.main(["launch", "train", "-j", "1x1", "--", *words(data, run, callback)]) == 0
    assert (run / "end.json").exists() and (tmp_path / "steps").read_text() == "4"


def test_options_reach_the_constructor_in_the_types_of_its_parameters(
    data: str, package: Path
) -> None:
    options = with_own_encoder([f"encoder={NET}", "encoder.layers=2", "encoder.hidden=4"])
    config = override(small_config(data, "run"), [*options, "encoder.dropout=0.25"])
    made = [own_encoder(config) for _ in range(2)]
    assert all(one is not None for one in made)
    assert made[0].given == {"hidden": 4, "layers": 2, "dropout": 0.25}  # type: ignore[union-attr]
    first, second = (dict(one.named_parameters()) for one in made if one is not None)
    assert all(bool((first[name] == second[name]).all()) for name in first), "by the seed"
    assert own_encoder(small_config(data, "run")) is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("encoder=own_net:GRUEncodr", "did you mean GRUEncoder"),
        ("encoder=no_such_package.net:GRU", "must name a module that can be imported"),
        ("encoder=own_net:", "must be package.module:Class, got 'own_net:'"),
        ("encoder=own_net:no_module", "must be a class of torch.nn.Module, got own_net:no_module"),
        ("encoder=os:system", "must be a class of torch.nn.Module, got os:system"),
        (f"encoder={NET} encoder.lagers=2", "option of GRUEncoder .* did you mean layers"),
        (f"encoder={NET} encoder.layers=two", "encoder.layers must be int, got 'two'"),
        ("encoder=torch.nn:GRU", "GRU must take what it is given .*, got "),
    ],
)
def test_an_encoder_that_cannot_be_made_is_refused_before_the_run(
    option: str, message: str, data: str, package: Path, tmp_path: Path
) -> None:
    config = override(small_config(data, str(tmp_path / "run")), with_own_encoder(option.split()))
    with pytest.raises((ValueError, TypeError), match=message):
        own_encoder(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_net:needs", "need no arguments, got own_net:needs"),
        ("own_net", "must be package.module:Class"),
        ("own_net:CountStep", "did you mean CountSteps"),
    ],
)
def test_a_callback_that_cannot_be_made_is_refused(name: str, message: str, package: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        own_callbacks([name])


def test_options_of_an_encoder_without_one_are_refused(data: str) -> None:
    with pytest.raises(ValueError, match="own_encoder.options must come with own_encoder.module"):
        override(small_config(data, "run"), ["own_encoder.options=layers=2"])
