"""Dataclasses as options: the examples that they choose, and a help that leaves nothing out."""

import dataclasses
import inspect
import re
from typing import Annotated, get_args

import pytest
import typer

from lib.losses import LOSSES
from lib.noise import NOISES
from lib.options import Examples, flag, parameters, take, with_options
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


def small_registry(kind, **classes):
    """A registry of classes {name: {field: (type, option)}}, called as their names capitalised."""
    registry = Registry(kind)
    for name, own in classes.items():
        made = [(key, *value) for key, value in own.items()]
        registry.register(name)(dataclasses.make_dataclass(name.title(), made, frozen=True))
    return registry


def command(model: str, as_json: Annotated[bool, typer.Option("--json")] = False, **options):
    """A command with an argument and an option of its own."""


def test_an_option_is_foreign_where_the_chosen_class_lacks_it():
    scale = {"scale": (float, option(1.0, "Scale."))}
    shapes = small_registry("shape", round=scale, oval=scale, square={})
    options = {"scale": 3.0, "other": 1}
    assert take(options, shapes, "oval") == shapes["oval"](3.0)
    assert options == {"other": 1}
    text = "--scale is not of the shape square (its options: none); --scale is of round, oval"
    with pytest.raises(typer.BadParameter, match=re.escape(text)):
        take({"scale": 3.0}, shapes, "square")


def test_an_option_of_two_groups_is_refused():
    """It would set both, whatever each means by it. Classes of one group may share an option."""
    scale = {"scale": (float, option(1.0, "Scale."))}
    shapes = small_registry("shape", round=scale, oval=scale)
    colours = small_registry("colour", red={"deep": (bool, option(False, "Deep."))})
    offered = inspect.signature(with_options(command, [shapes, colours])).parameters
    assert list(offered) == ["model", "as_json", "scale", "deep"]
    colours |= small_registry("colour", blue=scale)
    text = (
        "--scale would be an option of the shape Round, Oval and of the colour Blue: rename the "
        "field scale of your class"
    )
    with pytest.raises(ValueError, match=text):
        with_options(command, [shapes, colours])
    with pytest.raises(ValueError, match="--skip would be an option of Examples and of the shape"):
        with_options(command, [Examples, small_registry("shape", long={"skip": (int, 1)})])


@pytest.mark.parametrize("name", ["model", "json", "as_json", "help"])
def test_an_option_that_the_command_has_itself_is_refused(name):
    """It would never reach the class."""
    shapes = small_registry("shape", round={name: (int, 1)})
    text = (
        f"{flag(name)} would be an option of the command command itself and of the shape Round: "
        f"rename the field {name} of your class"
    )
    with pytest.raises(ValueError, match=text):
        with_options(command, [shapes])


def kind_of(registry):
    """The type of the one option of a registry."""
    (parameter,) = parameters(registry)
    return get_args(get_args(parameter.annotation)[0])[0]


def test_an_option_is_read_as_the_chosen_class_says():
    """Of classes that differ in its type it is text, until the class is known."""
    as_number = {"size": (float | None, option(None, "Size."))}
    shapes = small_registry("shape", round={"size": (int, 1)}, oval=as_number)
    assert kind_of(shapes) is str
    assert take({"size": "3"}, shapes, "round").size == 3
    assert take({"size": "0.5"}, shapes, "oval").size == 0.5
    with pytest.raises(typer.BadParameter, match=r"--size takes a whole number; got 0\.5"):
        take({"size": "0.5"}, shapes, "round")
    assert kind_of(small_registry("shape", oval=as_number)) is float


def test_the_choices_of_an_option_are_those_of_the_chosen_class():
    few, more = (
        {"size": (str, option("s", "Size.", choices))} for choices in (("s", "m"), ("s", "l"))
    )
    shapes = small_registry("shape", round=few, oval=more)
    assert get_args(kind_of(shapes)) == ("s", "m", "l")
    assert take({"size": "l"}, shapes, "oval").size == "l"
    with pytest.raises(typer.BadParameter, match="--size must be one of s, m; got l"):
        take({"size": "l"}, shapes, "round")
    assert kind_of(small_registry("shape", round=few, square={"size": (str, "x")})) is str


def test_a_switch_that_takes_a_value_elsewhere_is_refused():
    shapes = small_registry("shape", round={"deep": (bool, False)}, oval={"deep": (float, 1.0)})
    text = r"--deep would be a switch .* the shape Round, Oval: rename the field deep"
    with pytest.raises(ValueError, match=text):
        list(parameters(shapes))


def test_a_negative_stop_is_refused():
    with pytest.raises(ValueError, match="stop must be >= 0"):
        Examples(stop=-5).index(360)
