"""The driver of one run: a Config in, a trained and recorded run out. Starts Ray if there is none, and cleans up after it.

`train` does what `lmu-dist train` does; progress goes to a listener, so nothing here prints.
"""

import time

from lmu_dist.config import Config
from lmu_dist.data.manifest import is_prepared
from lmu_dist.data.prepare import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import make_cell
from lmu_dist.launch.claim import Finished, PerhapsGoneError
from lmu_dist.launch.cluster import check_before, cluster
from lmu_dist.launch.corpus import prepared
from lmu_dist.launch.series import Listener, run_series
from lmu_dist.tracking.delivery import set_client_limits
from lmu_dist.tracking.store import SILENCE_SECONDS, AwayError, Store

PAUSE_SECONDS = 5.0  # between two looks at whether another driver is gone


def train(
    config: Config, tracking_uri: str, progress: Progress = lambda *_: None, listener: Listener = lambda _: None
) -> Finished:
    """Prepares the data if need be, trains the cell from where it stood, records it. Raises ConfigError, FailedError.

    A cell that has ended is not run again: its record is delivered, if part of it still waits, and returned.
    """
    set_client_limits()
    store = Store(tracking_uri)
    check_before([config])
    try:
        store.check()
    except AwayError:
        if not is_prepared(config.data, config.storage_folder):
            raise  # before hours of preparing; later an absent store is no obstacle to a run it knows
    cell = make_cell(config, prepared(config, progress))
    cell.corpus.tokenizer()
    if (done := claim.find_done(cell, store, "train")) is not None:
        return done
    with claim.alone(cell):  # nobody is writing the checkpoints
        claim.check_resumable(cell)
    deadline = time.monotonic() + SILENCE_SECONDS + PAUSE_SECONDS
    with cluster([config]):
        while True:
            try:
                [finished] = run_series([cell], store, listener=listener)
                return finished
            except PerhapsGoneError:
                if time.monotonic() > deadline:
                    raise
                progress("waiting for a driver elsewhere that may be gone", 0, 1)
                time.sleep(PAUSE_SECONDS)
