"""The help of train and the command options say what every option means, from the docstrings."""

import pytest

from shardrec.launch import cli
from shardrec.launch.described import as_text, chosen, descriptions, groups
from shardrec.modules.losses import CCEMinus
from shardrec.pipeline.config import flatten, override
from shardrec.pipeline.recipes import default, demo


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.main(list(words)) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_the_help_of_train_explains_every_option_in_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "train", "--help")
    for name, value in flatten(default("DIR", "DIR")):
        if name not in ("data", "output") and not name.endswith(".type"):
            assert f"  {name}=" in text, name
            assert value is not None or f"  {name}=none " in text
    meaning = descriptions(CCEMinus)["num_negatives"]
    assert f"  loss.num_negatives=1024   (int)\n      {meaning}" in text
    assert "optimizer.decay=cosine   (`constant` or `cosine`)" in text
    assert "the run itself: " in text and "optimizer: How encoder and table are updated" in text
    assert max(map(len, text.splitlines())) <= 100


def test_another_loss_and_single_options_are_explained_when_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "options", "loss=sce", "optimizer.clip_norm")
    assert "loss.items_per_bucket=" in text and "loss.num_negatives" not in text
    assert text.count("optimizer.") == 1, "no other option of the optimizer"
    everything = said(capsys, "options")
    assert everything.startswith("the run itself:") and "checkpoints.keep=2" in everything


def test_every_choice_is_listed_where_no_config_has_chosen() -> None:
    found = groups(type(demo("DIR", "DIR")))
    names = [group.name for group in found]
    assert {"loss=cce", "loss=sce", "loss=hce", "encoder"} <= set(names)
    (sce,) = chosen(found, "loss=sce")
    assert all(option.meaning for group in found for option in group.options)
    assert as_text([sce]).startswith("loss=sce: ")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("lr=0.1", "did you mean catalog.learning_rate, optimizer.learning_rate"),
        ("batch_size=3", "did you mean batches.batch_size"),
        ("epochs=3", "did you mean limits.max_epochs"),
        ("hidden_size=3", "did you mean encoder.width"),
        ("num_layers=3", "did you mean encoder.num_blocks"),
        ("optimizer.lr=3", "did you mean .*optimizer.learning_rate"),
        ("qqqqq=3", "`shardrec options` explains all of them"),
    ],
)
def test_usual_names_lead_to_ours(typed: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        override(demo("DIR", "DIR"), [typed])


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--batch-size", "set batches.batch_size=VALUE, without dashes"),
        ("--lr", "set catalog.learning_rate=VALUE or optimizer.learning_rate=VALUE, without"),
        ("--encoder.width=64", "set encoder.width=VALUE, without dashes"),
        ("--prepard", "did you mean --prepared"),
    ],
)
def test_an_option_of_the_model_with_dashes_says_how_it_is_set(
    typed: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--prepared", "data", "--run", "run", typed, "3"]
    text = said(capsys, *words, code=2)
    assert hint in text and text.count("\n") == 1


def test_an_unknown_part_is_refused_with_near_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean optimizer" in said(capsys, "options", "optimiser", code=2)
