import argparse
from dataclasses import dataclass, field
from typing import Literal

import pytest

from shardrec.launch.options import Parser, add_options, read_options
from shardrec.pipeline.export import ExportConfig
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepare import PrepareConfig
from shardrec.pipeline.recommend import RecommendConfig
from shardrec.pipeline.synth import SynthConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Names of columns.

    Attributes:
        user: column of the user.
        item: column of the item.
    """

    user: str = "user_id"
    item: str = "item_id"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kitchen:
    """A stage's config.

    Attributes:
        source: where the
            events lie.
        num_pots: pots on 100% of the stove.
        heat: how hot.
        kind: which kind.
        spices: any number of them.
        limit: bytes, or none.
        pan: sizes of it.
        salted: whether to salt.
        columns: names.
    """

    source: str
    num_pots: int = 3
    heat: float = 0.5
    kind: Literal["gas", "coal"] = "gas"
    spices: tuple[str, ...] = ()
    limit: int | None = None
    pan: tuple[int, ...] = (1,)
    salted: bool = False
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        if self.num_pots < 1:
            raise ValueError(f"num_pots must be at least 1, got {self.num_pots}; use more pots")


def parser() -> Parser:
    made = Parser("cook", "Cooks.")
    add_options(made, Kitchen)
    return made


def read(*words: str) -> Kitchen:
    return read_options(Kitchen, parser().parse(words))


def test_defaults_are_the_config_s_own() -> None:
    assert read("--source", "log") == Kitchen(source="log")


def test_every_leaf_can_be_set() -> None:
    words = "--source log --num-pots 1_000 --heat 1e-3 --kind coal --spices salt,pepper --limit 7"
    kitchen = read(*words.split(), "--salted", "--columns.user", "customer")
    assert kitchen == Kitchen(
        source="log",
        num_pots=1000,
        heat=1e-3,
        kind="coal",
        spices=("salt", "pepper"),
        limit=7,
        salted=True,
        columns=Columns(user="customer"),
    )
    assert read("--source", "log", "--limit", "none").limit is None
    assert not read("--source", "log", "--no-salted").salted


def test_the_help_says_what_the_docstring_says_with_type_and_default() -> None:
    text = " ".join(parser().format_help().split())
    assert "--source STR where the events lie." in text
    assert "--num-pots INT pots on 100% of the stove. (default: 3)" in text
    assert "--kind {gas,coal} which kind. (default: gas)" in text
    assert "--spices STR,STR,… any number of them. (default: nothing)" in text
    assert "--columns.user STR column of the user. (default: user_id)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --source"),
        (["--sourc", "log"], "cook: option must be a known name, got '--sourc'; did you mean --s"),
        (["--source", "log", "--num-pot", "2"], "did you mean --num-pots"),
        (["--source", "log", "--num-pots", "two"], "cook: --num-pots must be int, got 'two'; "),
        (["--source", "log", "--pan", "4,a"], "cook: --pan must be int,int,…, got '4,a'; "),
        (["--source"], "cook: --source must be followed by a value, got none; give one"),
        (["--source", "log", "--kind", "oil"], "--kind must be 'gas' or 'coal', got 'oil'"),
        (["--source", "log", "more"], "arguments must follow an option, got 'more'; see"),
        (["--source", "/dev/null", "/dev/zero"], "got '/dev/zero'; put a glob in quotes"),
    ],
)
def test_bad_options_are_refused_in_one_line_with_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(*words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_errors_of_the_config_are_raised_as_they_are() -> None:
    with pytest.raises(ValueError, match="num_pots must be at least 1, got 0"):
        read("--source", "log", "--num-pots", "0")


def test_positional_arguments_may_stand_between_options() -> None:
    made = Parser("cook", "Cooks.")
    made.add_argument("--run")
    made.add_argument("overrides", nargs="*")
    namespace = made.parse(["a=1", "--run", "here", "b=2"])
    assert namespace == argparse.Namespace(run="here", overrides=["a=1", "b=2"])


@pytest.mark.parametrize(
    "stage", [SynthConfig, PrepareConfig, RecommendConfig, ExportConfig, MeasureConfig]
)
def test_every_option_of_a_stage_says_what_it_does(stage: type) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, stage)
    helps = {action.dest: str(action.help).partition("(default")[0] for action in parser._actions}
    assert len(helps) > 3
    assert not {name: text for name, text in helps.items() if len(text.split()) < 2}


def test_what_argparse_says_is_said_in_our_form(capsys: pytest.CaptureFixture[str]) -> None:
    made = Parser("cook", "Cooks.")
    either = made.add_mutually_exclusive_group()
    either.add_argument("--kind", choices=("gas", "coal"))
    either.add_argument("--cold", action="store_true")
    made.add_argument("--pots", type=int)
    made.add_argument("--heat", type=float)
    said = [
        (["--kind", "oil"], "--kind must be one of"),
        (["--kind", "gas", "--cold"], "--cold must come without --kind, got both; remove one"),
        (["--pots", "two"], "--pots must be a whole number, got 'two'; give one"),
        (["--heat", "two"], "--heat must be a number, got 'two'; give one"),
    ]
    for words, message in said:
        with pytest.raises(SystemExit):
            made.parse(words)
        assert capsys.readouterr().err.startswith(f"shardrec cook: {message}"), words


def test_a_value_may_look_like_an_option() -> None:
    assert read("--source", "-1").source == "-1"
    assert read("--source=--odd").source == "--odd"
    assert read("--source", "--odd name").source == "--odd name"
