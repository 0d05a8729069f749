"""A device's process, in which Ctrl-C while the rest is imported is no traceback either."""

import sys

if __name__ == "__main__":
    try:
        from ternbus.edge.shell.process import main

        main()
    except KeyboardInterrupt:
        from ternbus.broker.exit_codes import EXIT_INTERRUPTED

        sys.exit(EXIT_INTERRUPTED)
