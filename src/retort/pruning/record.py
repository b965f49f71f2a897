"""pruned.json: the part of a model that students start from, in model/ beside it."""

from pathlib import Path

from retort.artifacts.starts import part_keys
from retort.config.sections import Student
from retort.config.student import FromTeacher
from retort.io.fingerprints import fingerprint_weights
from retort.io.records import JsonObject, Record

PRUNED_FILE = "pruned.json"
_FOLDER = "model"


class PruningRecord(Record, format="retort-pruned", remedy="delete it, and prune again"):
    """pruned.json. name, revision, source: the whole model's path or Hub id, its commit, and its weights' fingerprint.

    part: the keys of student.from_teacher. layers: those that are kept, of `num_layers`. parameters: their number.
    weights: fingerprint of model/.
    """

    name: str
    revision: str | None
    source: str
    part: JsonObject
    layers: tuple[int, ...]
    num_layers: int
    parameters: int
    weights: str


def model_folder(record_path: Path) -> Path:
    """Return the folder of the pruned model whose record this is."""
    return record_path.parent / _FOLDER


def choose_start(student: Student, record_path: Path | None) -> Student:
    """Return the section of a student with the folder that it is loaded from, for one that starts as part of a model.

    record_path: pruned.json, None for a student that is not pruned. Raises ValueError when it is missing, is of another
    part, or the model beside it has changed.
    """
    if not student.is_pruned:
        return student
    if record_path is None:
        raise ValueError(
            f"student.from_teacher is set ({student.start}), so the student starts from a pruned model: give --start "
            "(pruned.json, which prune_teacher.py writes)."
        )
    record, folder = PruningRecord.read(record_path), model_folder(record_path)
    asked = part_keys(student.from_teacher)
    if record.part != asked:
        raise ValueError(
            f"{record_path} is of a model pruned to {record.part}, but student.from_teacher asks for {asked}. Give the "
            "pruned.json of this student."
        )
    if (found := fingerprint_weights(folder, record=record_path)) != record.weights:
        raise ValueError(
            f"{folder} holds other weights (fingerprint {found}) than {record_path} records ({record.weights}). "
            f"Delete {record_path.parent} and rerun the same command to prune the model again."
        )
    loaded = {"model_path": str(folder), "revision": None, "from_teacher": FromTeacher()}
    return student.model_copy(update=loaded)
