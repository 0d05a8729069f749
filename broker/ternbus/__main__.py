"""`python -m ternbus` is the command `ternbus`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The current folder, where a user may have a typer.py; the command `ternbus` does not look there either.
        del sys.path[0]
    from ternbus.command import main

    main()
