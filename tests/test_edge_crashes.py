"""A device that crashes between any two actions, on a network that loses, doubles and reorders messages."""

from hypothesis import settings

from support.crashing_device import CrashingDevice

TestCrashingDevice = CrashingDevice.TestCase
TestCrashingDevice.settings = settings(max_examples=100, stateful_step_count=80, deadline=None)
