"""The command `ternbus`, and `python -m ternbus`: so small that Ctrl-C during the imports gives no traceback."""

import sys


def main() -> None:
    """`ternbus.command.main`; exit code 130 where Ctrl-C comes before it can handle it."""
    try:
        from ternbus.command import main as command  # noqa: PLC0415 - the imports are what takes long

        command()
    except KeyboardInterrupt:
        from ternbus.broker.exit_codes import EXIT_INTERRUPTED  # noqa: PLC0415 - needed here only

        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The current folder may contain a file such as typer.py. The command `ternbus` does not import from there.
        del sys.path[0]
    main()
