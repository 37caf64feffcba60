"""What the tests of this package share."""

from hypothesis import HealthCheck, settings

# How long an example takes tells of the machine and what else runs on it: a test's own time limit is what ends one that hangs.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
