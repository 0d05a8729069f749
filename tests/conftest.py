"""What every test may count on, however the suite was started."""

import signal

# A shell starts what runs in the background deaf to Ctrl-C, and nohup deaf to the end of a session; then so would be
# all that tests start in order to interrupt it.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)
