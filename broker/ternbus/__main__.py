"""`python -m ternbus` is the command `ternbus`."""

from ternbus.command import main

if __name__ == "__main__":
    main()
