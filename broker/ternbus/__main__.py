"""`python -m ternbus` is the command `ternbus`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[
            0
        ]  # the current folder, where a user may have a typer.py: the command `ternbus` does not look there
    from ternbus.command import main

    main()
