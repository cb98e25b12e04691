"""The names of the tags of MLflow runs by which they are found and owned. Used by tracking, launch and scaling."""

PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
KEY = "lmu.key"  # only the runs of cells have one
RETIRED_KEY = "lmu.retired_key"  # the key of a run whose cell is trained again; it has no KEY any more
STATUS = "lmu.status"  # see `lmu_dist.records`
FOLDER = "lmu.folder"
OWNER_ID = "lmu.place"
HEARTBEAT = "lmu.alive_ms"
CLAIM = "lmu.claim"  # a random value, by which a driver that takes over a run sees whether another one does so too
STUDY = "lmu.study"  # the name of a study; only its parent run has one
LADDER_STUDY = "ladder"  # the value of STUDY for all ladders of an experiment; here, because trials import no MLflow
ANSWER = "lmu.answer"  # of a study: the answer of its newest report
BASELINE = "lmu.baseline"  # of a study: the family that its ladder compares the others with
REPORT = "lmu.report"  # of a run that holds a report: the digest of its inputs
REPORT_ANY_CODE = "lmu.report_any_code"
REPORT_FACTOR = "lmu.report_factor"  # the two families that its answer compares, as in lmu_over_transformer
STALE = "lmu.stale"
RESTORED_FROM = "lmu.restored_from"  # the table of records from which a run was restored: it has no curves and no files
RESTORED_RUN = "lmu.restored_run_id"  # the id that such a run had in the store that was lost
FORECAST = "lmu.forecast"  # of a run that holds a forecast: the cell that it is about
