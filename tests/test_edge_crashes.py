"""A device that crashes between any two actions, on a network that loses, doubles and reorders messages."""

from support.at_length import at_length, in_every_run
from support.crashing_device import CrashingDevice

TestCrashingDevice = in_every_run(CrashingDevice, max_examples=40, stateful_step_count=80)
TestCrashingDeviceAtLength = at_length(CrashingDevice, max_examples=300, stateful_step_count=80)
