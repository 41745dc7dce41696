"""How a command ends before its time: one line, an exit code.

0: done. 1: done, and what was asked for was not reached. 2: a user's mistake. 128 + n: signal n.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from vidsparse import interrupts
from vidsparse.terminal import printable


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"vidsparse: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def leave(more: str = "") -> NoReturn:
    """One line about the signal that has come, and the exit code that shells give it."""
    signum = interrupts.take() or signal.SIGINT
    what = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
    print(f"vidsparse: {what}{more}", file=sys.stderr)
    sys.exit(128 + signum)
