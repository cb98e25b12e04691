"""Launching, the only package that imports Ray: starts runs and watches them. The training itself is in train/."""

import os

# Ray reads these once, when it is imported. Without an explicit mode Ray 2.60 writes a token to the user's home folder, which
# changes the behaviour of every later cluster of the user.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
# For a local cluster: a run has about ten processes, most of which need no CPU, and Ray warns when more of them start at the
# same time than there are CPUs.
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
