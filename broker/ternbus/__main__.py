"""`python -m ternbus` is the command `ternbus`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The current folder may contain a file such as typer.py. The command `ternbus` does not import from there.
        del sys.path[0]
    from ternbus.command import main

    main()
