"""Which machine is meant: by its name in the table, or by what torch calls a GPU."""

from __future__ import annotations

from vidsparse.costs.machine import Machine, table
from vidsparse.costs.results import measured


def named(name: str) -> Machine:
    """A machine of the table, with what was measured on it. Raises ValueError for another name."""
    machines = table()
    if name not in machines:
        raise ValueError(f"--gpu {name}: expected {names()} or this")
    return measured(machines[name], machines[name].names)


def names() -> str:
    """Of the machines of the table."""
    return ", ".join(table())


def recognised(device_name: str) -> Machine | None:
    """The machine that torch calls so; None if it is not in the table."""
    for name, machine in table().items():
        if any(part in device_name for part in machine.names):
            return named(name)
    return None
