"""Creates the MLflow run of a cell, once, whichever driver comes first: a RunIdentity in, a run id out.

Called by launch/claim and upload.
"""

from lmu_dist.records import WAITING
from lmu_dist.tracking.errors import BusyError
from lmu_dist.tracking.owner import heartbeat_now, owner_id_of
from lmu_dist.tracking.run_identity import RunIdentity
from lmu_dist.tracking.runs import find_run, runs_with_key
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import open_study
from lmu_dist.tracking.tags import FOLDER, HEARTBEAT, KEY, OWNER_ID, PARENT, RUN_NAME, STATUS


def find_or_create_run(store: Store, identity: RunIdentity) -> str:
    """The id of a cell's run, created under its study if there is none. Raises BusyError if the run has another owner."""
    run = find_run(store, identity.key)
    if run is None:
        return create_run_of(store, identity)
    if owner_id_of(run) not in (None, identity.owner_id):
        raise BusyError(f"MLflow has a run of {identity.name} from {owner_id_of(run)}; metrics of two runs do not mix")
    return run.info.run_id


def create_run_of(store: Store, identity: RunIdentity) -> str:
    """Creates the run of a cell under its study. Raises BusyError if another driver does so at the same moment."""
    experiment_id, study_id = open_study(store, identity.experiment, identity.study)
    run_id = create_run(store, experiment_id, study_id, identity.name, identity.key, identity.folder, identity.owner_id)
    # Two drivers may create a run at the same moment. One that sees the other's run deletes its own; at least one does.
    if len(runs_with_key(store, identity.key)) > 1:
        with store.one_line_errors():
            store.client.delete_run(run_id)
        raise BusyError(f"{identity.name} was started by another driver at the same moment; wait for it")
    return run_id


def create_run(store: Store, experiment_id: str, study_id: str, name: str, key: str, folder: str, owner_id: str = "") -> str:
    """Creates a run of a cell under its study and returns its id. The default owner id is the folder."""
    with store.one_line_errors():
        tags = {
            PARENT: study_id,
            RUN_NAME: name,
            KEY: key,
            STATUS: WAITING,
            FOLDER: folder,
            OWNER_ID: owner_id or folder,
            HEARTBEAT: heartbeat_now(),
        }
        return store.client.create_run(experiment_id, tags=tags).info.run_id
