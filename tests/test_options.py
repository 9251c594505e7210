"""Dataclasses as options: the examples that they choose, and a help that leaves nothing out."""

import dataclasses
import inspect
import re

import pytest
import typer

from lib.losses import LOSSES
from lib.noise import NOISES
from lib.options import Examples, parameters, take_all, with_options
from lib.samplers import SAMPLERS
from lib.store.registry import Registry, option


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--skip 100", [0, 100, 200, 300]),
        ("--skip 20 --max 60", [0, 20, 40]),
        ("--start 7 --stop 10", [7, 8, 9]),
        ("--start 5 --skip 4 --stop 14", [8, 12]),
        ("--skip 150 --max -1 --start 1", [150, 300]),
        ("--start 358 --stop 1000", [358, 359]),
    ],
)
def test_examples_are_chosen_by_the_conventions_of_cohens_code(options, expected):
    """Those scripts loop over all indices, break at max or stop, and pass over those below start or
    not divisible by skip.
    """
    names = [name.removeprefix("--") for name in options.split()[::2]]
    values = map(int, options.split()[1::2])
    index = Examples(**dict(zip(names, values, strict=True))).index(360)
    assert index.tolist() == expected


@pytest.mark.parametrize("registry", [LOSSES, SAMPLERS, NOISES], ids=lambda r: r.kind)
def test_the_help_has_every_default(registry):
    said = {p.name: p.annotation.__metadata__[0].help for p in parameters(registry)}
    for name, cls in registry.items():
        for field in dataclasses.fields(cls):
            text = field.metadata.get("help", f"Of the {registry.kind}.").removesuffix(".")
            default = field.default
            if default not in (dataclasses.MISSING, None, ""):
                shown = "0.0667" if default == 10 / 150 else str(default)
                text = rf"{re.escape(text)}[.,] \[dim\]default {re.escape(shown)}\[/\]"
            else:
                text = re.escape(text)
            whose = rf"([\w-]+, )*{name}(, [\w-]+)*: " if ": " in said[field.name] else ""
            assert re.search(whose + text, said[field.name]), (name, field.name)


def test_an_option_of_two_groups_goes_to_each_that_was_chosen():
    """And is foreign only where no chosen one has it."""
    shapes, colours = Registry("shape"), Registry("colour")

    @shapes.register("round")
    @dataclasses.dataclass(frozen=True)
    class Round:
        scale: float = option(1.0, "Of the shape.")

    @shapes.register("square")
    @dataclasses.dataclass(frozen=True)
    class Square:
        pass

    @colours.register("red")
    @dataclasses.dataclass(frozen=True)
    class Red:
        scale: float = option(2.0, "Of the colour.")

    @colours.register("blue")
    @dataclasses.dataclass(frozen=True)
    class Blue:
        deep: bool = option(False, "Deep.")

    options = {"scale": 3.0, "other": 1}
    assert take_all(options, (shapes, "square"), (colours, "red")) == [Square(), Red(3.0)]
    assert options == {"other": 1}
    options = {"scale": 3.0}
    assert take_all(options, (shapes, "round"), (colours, "red")) == [Round(3.0), Red(3.0)]
    text = "--scale is not of the shape square (its options: none); --scale is of round"
    with pytest.raises(typer.BadParameter, match=re.escape(text)):
        take_all({"scale": 3.0}, (shapes, "square"), (colours, "blue"))

    def command(**options):
        pass

    (parameter, _) = inspect.signature(with_options(command, [shapes, colours])).parameters.values()
    said = parameter.annotation.__metadata__[0].help
    assert (
        said == "round: Of the shape. [dim]default 1.0[/]; red: Of the colour. [dim]default 2.0[/]"
    )


def test_a_negative_stop_is_refused():
    with pytest.raises(ValueError, match="stop must be >= 0"):
        Examples(stop=-5).index(360)
