"""Signals become one exception at a harmless point; the command ends with one line, whenever."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from vidsparse import interrupts
from vidsparse.interrupts import Interrupted, check, held, interruptible, listening

ROOT = Path(__file__).resolve().parent.parent


def send(signum=signal.SIGINT):
    """To this process; its handler has run on return."""
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def python_s_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_held_signal_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        send()
        done.append("the rest")
    assert done and interrupts.pending() == 0


def test_a_held_signal_is_raised_by_check_and_inside_interruptible():
    for look in (check, interruptible().__enter__):
        with pytest.raises(KeyboardInterrupt), held():
            send()
            with pytest.raises(Interrupted) as raised:
                look()
            assert raised.value.signum == signal.SIGINT
    with pytest.raises(KeyboardInterrupt), held(), interruptible():
        send()
        raise AssertionError("it is raised at once")


def test_a_second_signal_does_not_break_the_cleaning_up():
    cleaned = []
    with pytest.raises(KeyboardInterrupt), listening():
        try:
            send()
        finally:
            send(signal.SIGTERM)
            send()
            cleaned.append("all of it")
    assert cleaned


def test_an_interrupt_that_a_callback_swallows_comes_again(capsys):
    class Cycle:
        def __del__(self):
            send()

    with pytest.raises(KeyboardInterrupt), listening():
        cycle = Cycle()
        cycle.me = cycle
        del cycle
        gc.collect()
        for _ in range(200):
            time.sleep(0.02)
        raise AssertionError("it was lost")
    assert capsys.readouterr().err == ""


def test_handlers_are_put_back_and_get_the_signal():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    try:
        with listening():
            with pytest.raises(Interrupted):
                send(signal.SIGTERM)
            assert not seen
        assert seen == ["theirs"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening():
            send(signal.SIGHUP)
            check()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_left_alone():
    def work():
        with held(), interruptible():
            check()
            seen.append(signal.getsignal(signal.SIGINT))

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


EARLY = """
import builtins, os, signal, sys
real, sent = builtins.__import__, []
def importing(name, *args, **options):
    if name == {where!r} and not sent:
        sent.append(os.kill(os.getpid(), signal.{signum}))
    return real(name, *args, **options)
sys.argv = ["vidsparse", "presets"]
builtins.__import__ = importing
from vidsparse.__main__ import main
main()
"""


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("where", ["typer", "json", "vidsparse.terminal", "vidsparse.cli"])
def test_a_signal_during_the_imports_is_one_line(where, signum):
    program = EARLY.format(where=where, signum=signum)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + getattr(signal, signum), done.stderr
    assert done.stderr == "vidsparse: interrupted\n" and done.stdout == ""


def test_the_command_and_the_module_have_the_same_entry_point():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert content["project"]["scripts"]["vidsparse"] == "vidsparse.__main__:main"
    run = [sys.executable, "-m", "vidsparse", "--version"]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout[:10] == "vidsparse "


def test_nothing_is_imported_before_an_interrupt_is_dealt_with():
    program = (
        "import sys; before = set(sys.modules); import vidsparse.__main__; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['vidsparse', 'vidsparse.__main__']"
