"""One video by several processes that torchrun has started: who speaks, who follows, how all end.

Every process runs the same command. The first one speaks, writes and decides what is made; the
others load the model too, take their share of every forward, and write nothing. An error of one
ends it, and torchrun ends the others. What is no tensor of a forward goes by gloo.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vidsparse.generate.model_files import InputError

MOST = 1024
"""Processes that may share a video; no model has as many heads."""


def launched() -> bool:
    """Whether a launcher has started this process, and perhaps others."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ)


def leads(ulysses: int) -> bool:
    """Whether this process speaks, of those that share a video; alone, it does."""
    return ulysses == 1 or not launched() or os.environ["RANK"] == "0"


def check(ulysses: int, command: str) -> None:
    """Raise InputError unless so many processes run the command."""
    if not 1 <= ulysses <= MOST:
        raise InputError(f"--ulysses {ulysses}: expected 1 .. {MOST}")
    if ulysses == 1:
        return
    found = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if found != ulysses:
        raise InputError(
            f"--ulysses {ulysses}: {found} process{'es' * (found > 1)} of this command runs; start "
            f"torchrun --nproc-per-node {ulysses} -m vidsparse {command} ... --ulysses {ulysses}"
        )


def place(ulysses: int, device: str) -> str:
    """The device of this process, of a device that all share by its kind. Raises InputError."""
    if ulysses == 1 or device == "cpu":
        return device
    if ":" in device:
        raise InputError(
            f"--device {device}: each of the processes has its own; take --device cuda"
        )
    import torch

    local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= found:
        raise InputError(
            f"--ulysses {ulysses}: process {local} of this machine has no GPU of its "
            f"own, there are {found}; start at most {found} processes here"
        )
    return f"cuda:{local}"


@contextmanager
def joined(ulysses: int, device: str) -> Iterator[None]:
    """The processes can talk inside. device: of this one. Raises InputError if one has ended."""
    if ulysses == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from diffusers.utils import logging

    logging.set_verbosity_error()  # each would warn that sharing is experimental
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield
    except Exception as error:
        if not _lost(error):
            raise
        why = "another process that shares the video has ended, for the reason that it gives"
        raise InputError(why) from error
    dist.destroy_process_group()  # not after an error: others may wait for what will not come


def tell(ulysses: int, what: Any = None) -> Any:
    """What the first process says, in all of them; it waits for none. Alone, nothing is sent."""
    if ulysses == 1:
        return what
    import torch
    import torch.distributed as dist

    said = [what]
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]


@contextmanager
def following() -> Iterator[None]:
    """Inside, an error of a process that does not speak ends it, one of the user in one line."""
    name = f"process {os.environ.get('RANK')}"
    try:
        yield
    except InputError as error:
        sys.exit(f"vidsparse: {name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _lost(error):
            raise
        traceback.print_exc()
        sys.exit(1)


def _lost(error: Exception) -> bool:
    """Whether an exchange failed because another process is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()
