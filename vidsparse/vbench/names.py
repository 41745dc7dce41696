"""What VBench calls a clip: it finds the prompt, or the clip, by the name of the file.

VBench 0.1.5, standard   "<prompt>-<i>.mp4", i = 0 .. 4, in one flat folder
VBench 0.1.5, custom     any name; the prompt is the stem without a last "-<digits>", unless a
                         list of prompts by file name is given
VBench-2.0               "<first 180 characters of the prompt>-<i>.mp4", a folder per dimension
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vidsparse.jobs.layout import slug

SUFFIX = ".mp4"
LONGEST = 255
"""Bytes of a file name."""
SECOND_CUT = 180
"""Characters of a prompt in a name of VBench-2.0."""
RESERVED = '<>:"/\\|?*'
"""Characters that some file system refuses."""


def prompt_of(name: str) -> str:
    """The prompt that VBench 0.1.5 reads from a file name."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def index_of(name: str) -> int:
    """The sample's number in a file name; 0 if it has none."""
    found = re.search(r"-([0-9]+)$", Path(name).stem)
    return int(found[1]) if found else 0


def standard(prompt: str, index: int) -> str:
    """The name under which VBench 0.1.5 looks for a sample of a prompt.

    Raises ValueError if no file can be called that.
    """
    return _checked(f"{prompt}-{index}{SUFFIX}", prompt)


def second(prompt: str, index: int) -> str:
    """The name under which VBench-2.0 looks for it. Raises ValueError as `standard`."""
    return _checked(f"{prompt[:SECOND_CUT]}-{index}{SUFFIX}", prompt)


def custom(clips: Sequence[tuple[str, int]]) -> list[str]:
    """Names for (prompt, index) pairs that differ on every file system, in their order.

    The standard name where every file system takes it and no other differs from it by case alone;
    else words of the prompt and a hash of it. Raises ValueError if a pair comes twice.
    """
    plain = [f"{prompt}-{index}{SUFFIX}" for prompt, index in clips]
    taken = Counter(folded(name) for name in plain)
    names = [
        name if taken[folded(name)] == 1 and portable(name) else _by_hash(*clip)
        for name, clip in zip(plain, clips, strict=True)
    ]
    if twice := [name for name, n in Counter(map(folded, names)).items() if n > 1]:
        raise ValueError(f"two clips would be called {twice[0]!r}: leave one of them")
    return names


def portable(name: str) -> bool:
    """Whether every common file system takes the name as it is."""
    return (
        len(name.encode(errors="surrogatepass")) <= LONGEST
        and name[0] not in ".-"
        and not any(c in RESERVED or unicodedata.category(c)[0] == "C" for c in name)
        and unicodedata.is_normalized("NFC", name)
    )


def folded(name: str) -> str:
    """Equal for names that a file system may take for the same."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _by_hash(prompt: str, index: int) -> str:
    digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{slug(prompt) or 'video'}-{digest}-{index}{SUFFIX}"


def _checked(name: str, prompt: str) -> str:
    cure = "; --custom gives it another name, for the dimensions that take clips of your own"
    if not prompt:
        raise ValueError(f"a clip has no prompt{cure}")
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        raise ValueError(f"no file can be called {name!r}{cure}") from None
    if "/" in name or "\0" in name:
        raise ValueError(f"the prompt {prompt!r} cannot be a file name, as VBench wants it{cure}")
    if length > LONGEST:
        raise ValueError(f"{name!r} has {length} bytes, a file name at most {LONGEST}{cure}")
    return name
