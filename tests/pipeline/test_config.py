"""Configs survive JSON, and a misspelt option is never ignored."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from shardrec.pipeline.config import (
    describe,
    describe_changes,
    flatten,
    from_json,
    override,
    parse,
    to_json,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FullMinus:
    number: ClassVar[str] = "no option"
    num_negatives: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(
                f"num_negatives must be at least 1, got {self.num_negatives}; add some"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    kind: Literal["sgd", "adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.98)
    ks: tuple[int, ...] = (5, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    data: str
    loss: Full | FullMinus = field(default_factory=Full)
    optimizer: Optimizer = field(default_factory=Optimizer)
    max_steps: int | None = None
    shuffle: bool = True


def test_a_config_survives_json() -> None:
    run = Run(data="x", loss=FullMinus(num_negatives=7), max_steps=3)
    text = json.dumps(to_json(run))
    assert json.loads(text)["loss"] == {
        "type": "full_minus",
        "num_negatives": 7,
        "temperature": 1.0,
    }
    assert from_json(Run, json.loads(text)) == run


def test_overrides_set_typed_leaves() -> None:
    run = override(
        Run(data="x"),
        [
            "loss.num_negatives=1e2",  # before the switch it depends on
            "loss=full_minus",
            "optimizer.betas=0.8,0.9",
            "optimizer.ks=1,2,3",
            "optimizer.kind=sgd",
            "max_steps=1_000",
            "shuffle=off",
        ],
    )
    assert run.loss == FullMinus(num_negatives=100)
    assert run.optimizer == Optimizer(kind="sgd", betas=(0.8, 0.9), ks=(1, 2, 3))
    assert (run.max_steps, run.shuffle) == (1000, False)
    assert override(run, ["max_steps=none"]).max_steps is None


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("max_step=3", "did you mean max_steps"),
        ("optimizer.beta=1", "optimizer.betas"),
        ("betas=0.8,0.9", "optimizer.betas"),
        ("los=full", "loss"),
        ("loss=ful_minus", "full_minus"),
        ("loss.num_negatives=3", "option must be a known name"),
        ("max_steps.more=3", "option must be a known name"),
        ("optimizer=adam", "they are kind, betas, ks"),
        ("max_steps=many", "must be none or int, got 'many'"),
        ("max_steps=1.5", "must be none or int"),
        ("optimizer.kind=adamw", "'sgd' or 'adam'"),
        ("optimizer.betas=1", "got '1'"),
        ("shuffle=perhaps", "must be bool"),
        ("max_steps", "must read name=value"),
    ],
)
def test_a_wrong_override_says_what_would_be_right(assignment: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        override(Run(data="x"), [assignment])


def test_a_misspelt_option_of_what_was_switched_to_is_named() -> None:
    with pytest.raises(ValueError, match=r"did you mean loss\.num_negatives"):
        override(Run(data="x"), ["loss=full_minus", "loss.num_negative=3"])


def test_what_is_no_field_is_no_option() -> None:
    with pytest.raises(ValueError, match=r"did you mean loss\.num_negatives") as error:
        override(Run(data="x"), ["loss=full_minus", "loss.number=3"])
    assert "loss.number," not in str(error.value)


def test_checks_run_on_the_complete_result() -> None:
    with pytest.raises(ValueError, match="num_negatives must be at least 1, got 0"):
        override(Run(data="x"), ["loss=full_minus", "loss.num_negatives=0"])


def test_json_with_unknown_missing_or_mistyped_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="config.data must be set"):
        from_json(Run, {})
    with pytest.raises(ValueError, match="did you mean max_steps"):
        from_json(Run, {"data": "x", "max_stepz": 1})
    with pytest.raises(TypeError, match="config.max_steps must be none or int, got True"):
        from_json(Run, {"data": "x", "max_steps": True})
    with pytest.raises(TypeError, match="config.optimizer"):
        from_json(Run, {"data": "x", "optimizer": 3})


def test_every_leaf_is_described() -> None:
    lines = describe(Run(data="x")).splitlines()
    assert 'loss.type = "full"' in lines and "optimizer.betas = [0.9, 0.98]" in lines
    assert dict(flatten(Run(data="x")))["optimizer.kind"] == "adam"


def test_only_changes_are_described() -> None:
    changed = Run(data="x", loss=FullMinus(), optimizer=Optimizer(ks=(5,)), shuffle=False)
    assert describe_changes(changed).splitlines() == [
        'data = "x"',
        'loss = "full_minus"',
        "optimizer.ks = [5]",
        "shuffle = false",
    ]
    same_kind = dataclasses.replace(changed, loss=Full(temperature=0.5))
    assert "loss.temperature = 0.5" in describe_changes(same_kind)


def test_strings_keep_their_text() -> None:
    assert parse(str | None, "1e3", "name") == "1e3"
    assert parse(float, "1e3", "name") == 1000.0
