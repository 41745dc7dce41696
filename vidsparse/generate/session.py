"""A session: what surrounds a command that runs a pipeline, with a display on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vidsparse import interrupts
from vidsparse.ending import fail, leave
from vidsparse.generate.model_files import InputError
from vidsparse.terminal import printable, quiet_libraries

if TYPE_CHECKING:  # with it torch
    from vidsparse.generate.display import Display


@dataclass
class Session:
    """left: what an interrupt would leave behind from now on, in words."""

    display: Display
    left: str


@contextmanager
def session(left: str) -> Iterator[Session]:
    """A mistake of the user ends the command inside with one line, an interrupt with what is left.

    An interrupt that says in notes what it leaves knows better.
    """
    from rich.console import Console

    console = Console(stderr=True)
    quiet_libraries()
    found = None
    try:
        with console.status("importing torch and diffusers") as status:
            from vidsparse.generate.display import Display, hide_bars

            interrupts.check()
            hide_bars()
            found = Session(Display(console, status), left)
            try:
                yield found
            except InputError as error:
                if not interrupts.pending():
                    fail(str(error))
                leave(f"; {found.left}")  # a library has made an error of its own of it
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", None) or [found.left if found else left]
        leave(f"; {printable('; '.join(notes))}")
