"""What holds for every test, whatever it is of: no clock of Hypothesis', and the signals that a terminal would give."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# How long an example takes tells of the machine and what else runs on it: a test's own time limit is what ends one that hangs.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# A shell's background job ignores SIGINT and SIGQUIT, and what nohup starts SIGHUP; so would all that tests start. A handler that
# does nothing keeps this process from ending when somebody logs out, and is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
