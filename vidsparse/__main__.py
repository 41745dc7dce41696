"""`python -m vidsparse`, and the entry point of the command `vidsparse`.

Nothing is imported above `main`: from its first line on an interrupt is one line and an exit code,
also while the modules of the command are being imported and while the interpreter shuts down.
"""


def main() -> None:
    """Run the command and end the process."""
    try:
        from vidsparse import interrupts

        with interrupts.listening(last=True):
            try:
                from vidsparse.cli import main as command

                command()
            except BaseException:
                signum = interrupts.take()
                if signum:  # it came in an import, which may have made any error of it
                    _end(signum)
                raise
            finally:
                _flush()
    except KeyboardInterrupt:
        _end(2)


def _end(signum: int) -> None:
    import sys

    sys.stderr.write("vidsparse: interrupted\n")
    raise SystemExit(128 + signum) from None


def _flush() -> None:
    import sys
    from contextlib import suppress

    with suppress(OSError, ValueError):  # the interpreter will say so
        sys.stdout.flush()


if __name__ == "__main__":
    main()
