"""Prints the results of commands: tables on stdout, progress on stderr. Used only by the command line."""

from lmu_dist.show.clusters import print_cluster, print_job, print_jobs, print_log, print_package
from lmu_dist.show.console import console, print_json
from lmu_dist.show.fit import print_fit, print_table_notes
from lmu_dist.show.laws import print_comparison, print_forecast, print_optimum
from lmu_dist.show.plan import print_plan
from lmu_dist.show.progress import ProgressBars, progress_bars
from lmu_dist.show.report import print_report
from lmu_dist.show.runs import print_ladder, print_status, print_tune

__all__ = [
    "ProgressBars",
    "console",
    "print_cluster",
    "print_comparison",
    "print_fit",
    "print_forecast",
    "print_job",
    "print_jobs",
    "print_json",
    "print_ladder",
    "print_log",
    "print_optimum",
    "print_package",
    "print_plan",
    "print_report",
    "print_status",
    "print_table_notes",
    "print_tune",
    "progress_bars",
]
