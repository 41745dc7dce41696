"""What reaches a terminal: text of others without control characters, bounded; no chatter."""

from __future__ import annotations

import os
import unicodedata
import warnings

LONGEST = 1000
"""Characters of one message that are shown."""

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_HARMLESS = "\u200c\u200d"  # joiners, which scripts and emoji are written with


def printable(text: str, longest: int = LONGEST) -> str:
    """The text with control characters written out, as \\x1b, and its middle left out if long.

    Written out are controls, marks that turn the direction of writing, line separators and lone
    surrogates. What is left out is said: "... 12,345 characters ...".
    """
    if len(text) > longest:
        gap = f" ... {len(text) - longest:,} characters ... "
        text = text[: longest * 2 // 3] + gap + text[len(text) - longest // 3 :]
    return "".join(_written_out(c) if _hidden(c) else c for c in text)


def quiet_libraries() -> None:
    """Only errors of the libraries below us come through; a level that the user has set stays."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")  # read when they are imported
    for name in ("diffusers", "transformers", "torch", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=name)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE and character not in _HARMLESS


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
