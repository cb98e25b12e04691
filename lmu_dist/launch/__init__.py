"""Launching: the only room that knows Ray. Starts and watches runs; the training itself is in train/."""

import os

# Ray reads these once, when it is imported. The mode is said explicitly, or Ray 2.60 writes a token into the home folder
# by which every later cluster of this user changes its behaviour.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
# Of a Ray started here: a run has some ten processes, most of which take no CPU of their own, and Ray warns when more come up
# at once than there are CPUs.
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
