"""Launching: the only room that knows Ray. Starts and watches runs; the training itself is in train/."""

import os

# Ray reads these once, when it is imported. The mode is said explicitly, or Ray 2.60 writes a token into the home folder
# by which every later cluster of this user changes its behaviour.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
