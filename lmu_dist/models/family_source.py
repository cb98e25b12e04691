"""FamilySource: the text of a family in a user's file, as it travels to other processes. Imports no torch.

Read by models/registry on the driver, and executed there and by the workers (`registry.register`).
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

FAMILY_CODE = "family.py"  # name of the copy of the text in the folder of a run, and of an exported model


@dataclass(frozen=True)
class FamilySource:
    """The text of a family in a user's file, for processes without access to the file."""

    reference: str  # absolute path:CLASS
    text: str

    @property
    def path(self) -> Path:
        """Path of the file on the machine where it was read."""
        return Path(self.reference.rpartition(":")[0])

    @property
    def digest(self) -> str:
        """sha256 of the text, 12 digits: the version of the family."""
        return sha256(self.text.encode()).hexdigest()[:12]
