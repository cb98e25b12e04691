"""Runs the command line as `python -m lmu_dist.cli`, for example where `lmu-dist` is not on PATH."""

import sys

from lmu_dist.cli import main

sys.exit(main())
