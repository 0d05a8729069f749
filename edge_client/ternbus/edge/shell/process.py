"""The process of a device that trains or evaluates, without the command line's libraries.

`ternbus edge run` replaces itself by this process after it has parsed the arguments: typer and its dependencies would
take 12 MB of a small device's memory during training.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from ternbus.broker.errors import ConfigError, CorruptError, LinkError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED
from ternbus.edge.core.profile import Role
from ternbus.edge.shell import agent
from ternbus.edge.shell.agent import Options
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.printer import Printer


def run_device(home: DeviceDirectory, role: Role, options: Options, *, as_json: bool) -> int:
    """Run the device: in a fresh interpreter with the same process id, or here if torch is loaded already."""
    agent.check(home.joined(), options)  # raises ConfigError before the process is replaced
    if "torch" not in sys.modules:
        request = {"folder": str(home.folder), "role": role, "options": asdict(options), "as_json": as_json}
        sys.stdout.flush()
        command = [sys.executable, "-P", "-m", __name__, json.dumps(request)]
        os.execv(sys.executable, command)  # noqa: S606 - ourselves, without a shell
    printer = Printer(as_json=as_json)
    stop, ended = agent.serve(home, role, options, printer)
    return printer.finish(stop, ended=ended)


def main() -> NoReturn:
    """Run the device of the request in the arguments. The exit codes are those of the `ternbus` command."""
    request = json.loads(sys.argv[1])
    printer = Printer(as_json=request["as_json"])
    try:
        home, options = DeviceDirectory(Path(request["folder"])), Options(**request["options"])
        stop, ended = agent.serve(home, request["role"], options, printer)
        code = printer.finish(stop, ended=ended)
    except (ConfigError, CorruptError, LinkError) as error:
        sys.stderr.write(f"ternbus: {error}\n")
        code = EXIT_FAILED if isinstance(error, LinkError) else EXIT_CONFIG
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
