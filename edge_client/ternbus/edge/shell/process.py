"""The process of a device that trains or evaluates, without the command line's libraries.

`ternbus edge run` replaces itself by this process after it has parsed the arguments: typer and its dependencies would
take 12 MB of a small device's memory during training.
"""

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from ternbus.broker.complaint import complaint
from ternbus.broker.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from ternbus.broker.json_output import json_output
from ternbus.broker.kept_memory import keep_freed
from ternbus.broker.streams import prepare_streams
from ternbus.edge.shell import agent
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.printer import Printer

KEPT_BYTES: Final = 2**26  # some vectors of a model of four million parameters


def main() -> NoReturn:
    """Run the device of the request in the arguments. The exit codes are those of the `ternbus` command."""
    prepare_streams()
    code = _run(json.loads(sys.argv[1]))
    try:
        sys.stdout.flush()
    except OSError:  # its reader has ended, or it is a file on a full disk: nothing else may try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if threading.active_count() > 1:  # a thread of the task's code, for which Python would wait
        os._exit(code)
    sys.exit(code)


def run(request: dict[str, Any]) -> int:
    """Run the device of a request in this process; return the exit code."""
    keep_freed(KEPT_BYTES)
    as_json, home = request["as_json"], DeviceDirectory(Path(request["folder"]))
    with json_output(as_json) as output:
        printer = Printer(as_json=as_json, output=output)
        stop, ended = agent.serve(home, request["role"], Options(**request["options"]), printer)
        return printer.finish(stop, ended=ended)


def _run(request: dict[str, Any]) -> int:
    try:
        return run(request)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILED
    except Exception as error:
        if (known := complaint(error)) is None:
            raise
        text, code = known
        with suppress(OSError):  # standard error, too, may be a file on a full disk
            sys.stderr.write(f"ternbus: {text}\n")
        return code


if __name__ == "__main__":
    main()
