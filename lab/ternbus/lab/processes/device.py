"""The process of one device in the testbed: join the federation if necessary, then run.

One process instead of `ternbus edge join` and `ternbus edge run`, because both would import PyTorch.
"""

import argparse
import json
import runpy
import signal
import sys
from pathlib import Path

from ternbus.broker.complaint import end_in_words
from ternbus.broker.files import load_toml
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.sums.terms import AGGREGATOR, MASK
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.plan.sum_policy import MIN, SumPolicy
from ternbus.edge.shell import agent
from ternbus.edge.shell.directory import TOML, DeviceDirectory
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.printer import Printer


def main() -> None:
    """Join, then execute the rest of the arguments as `ternbus edge run …` or `ternbus edge evaluate …`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("invitation", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--partition", default="all")
    parser.add_argument("--hold-out", type=float, default=0.0)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", default="{}", help="The scenario's, in JSON: its budget is the device's own.")
    parser.add_argument("--helper", action="append", default=[], help="Key of a helper of private sums to pin.")
    parser.add_argument("--private-min", type=int, default=MIN)
    parser.add_argument("--private-kind", default=MASK)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    _join(given)
    sys.argv[:] = ["ternbus", "edge", *given.command]
    runpy.run_module("ternbus", run_name="__main__", alter_sys=True)


def _join(given: argparse.Namespace) -> None:
    home = DeviceDirectory(given.folder)
    if (home.folder / TOML).exists() and not home.settings().code:
        return  # joined before, and restarted after a kill
    printer = Printer(as_json=False)
    model = load_task(given.task)
    settings = home.prepare(
        Invitation.from_table(load_toml(given.invitation), str(given.invitation)),
        task=given.task,
        data=given.data,
        partition=given.partition,
        seed=given.seed,
        hold_out=given.hold_out,
        width=given.width,
        sums=_pinned(given) if given.helper else None,
        policy=PrivacyPolicy.of(Plan.from_meta({**model.default_plan, **json.loads(given.plan)})),
    )
    stop = agent.join(home, settings, model, Options(), printer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # replace the handlers of `join`, which has ended
    if home.settings().code:
        printer.end(stop)
        sys.exit(stop.code)


def _pinned(given: argparse.Namespace) -> SumPolicy:
    return SumPolicy.of(given.helper, given.private_min, AGGREGATOR, kind=given.private_kind)


if __name__ == "__main__":
    end_in_words(main)
