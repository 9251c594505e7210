"""Things known by name: frozen dataclasses that are written as data and restored from it.

Noises, samplers and losses are such things. Registering a class is all that records, run
settings and the command line need in order to know it.
"""

import dataclasses

import numpy as np


def option(default, help, choices=None):
    """A dataclass field that is also a command-line option.

    - default: its default value; dataclasses.MISSING: it must be given.
    - help: one line for `--help`.
    - choices: the values it may have, where they are few.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Registry(dict):
    """Classes by name: {name: frozen dataclass}.

    - kind: what the classes are ("noise", "sampler"), for error messages.
    - needs: names that each class must have.
    """

    def __init__(self, kind, needs=()):
        super().__init__()
        self.kind, self.needs = kind, needs

    def register(self, name):
        """Decorator: make a frozen dataclass known under `name`."""

        def add(cls):
            old = self.get(name, cls)
            if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is registered already: take another name")
            said = {name: value for base in cls.__mro__[::-1] for name, value in vars(base).items()}
            if lacks := [need for need in self.needs if said.get(need) is None]:
                raise ValueError(
                    f"{self.kind} {name!r} lacks {', '.join(lacks)}: each {self.kind} has "
                    f"{', '.join(self.needs)}"
                )
            self[name] = cls
            cls.name = name
            return cls

        return add

    def make(self, name, **options):
        """The thing of this name with these options. Raises ValueError naming what is unknown."""
        if name not in self:
            raise ValueError(
                f"{self.kind} must be one of {', '.join(self)}; got {name!r} (one of your own: "
                "register its class, and run your file in place of -m lib)"
            )
        known = [field.name for field in dataclasses.fields(self[name])]
        if foreign := sorted(set(options) - set(known)):
            raise ValueError(
                f"{self.kind} {name} takes no {', '.join(foreign)}; it takes {', '.join(known)}"
            )
        return self[name](**options)

    def describe(self, thing):
        """{"name": ..., and each field}: all that restores it, as JSON knows it.

        Raises ValueError where its class is not registered.
        """
        name = next((name for name, cls in self.items() if cls is type(thing)), None)
        if name is None:
            raise ValueError(
                f"{self.kind} {type(thing).__name__} is not registered: put "
                f"@register above its class, so that files can name it"
            )
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
        return {"name": name} | {key: _plain(value) for key, value in fields.items()}

    def restore(self, description):
        """The thing that `describe` described. Raises ValueError where it is unknown."""
        if not isinstance(description, dict) or "name" not in description:
            raise ValueError(f"{self.kind} must be described by name and fields; got {description}")
        options = {key: value for key, value in description.items() if key != "name"}
        return self.make(description["name"], **options)


def _plain(value):
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
