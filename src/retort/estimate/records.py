"""What is estimated, as JSON: `retort estimate --json`."""

from retort.io.records import Entry, Record

KEPT_FILE = "estimate.json"  # beside the record of a config's check


class Device(Entry):
    """What the work is planned for. memory: bytes of each, None for a CPU; peak: operations a second of each."""

    name: str
    number: int
    memory: float | None
    peak: float | None


class TextEstimate(Entry):
    """The training text. id: of its tokens; relative_error: half of the 95 % interval of `tokens`, None: not known."""

    id: str
    name: str
    documents: int | None
    sequences: int
    tokens: int
    positions: int
    longest: int
    basis: str
    relative_error: float | None


class CacheEstimate(Entry):
    """A cache, by its id. disk_bytes: while it is merged; free_bytes: of its disk. relative_error: as in plan.json."""

    id: str
    method: str
    bytes_per_position: float
    relative_error: float | None
    basis: str
    record_bytes: int
    disk_bytes: int
    free_bytes: int


class TeacherMemory(Entry):
    """Bytes of a teacher: all weights, activations of a batch, logits and what is selected of them.

    program: of Python and its libraries, where the memory is that of a CPU.
    """

    program: int
    weights: int
    activations: int
    selection: int

    @property
    def peak(self) -> int:
        """The bytes of all together."""
        return self.program + self.weights + self.activations + self.selection


class TeacherEstimate(Entry):
    """One pass of a teacher over a text. id: of its cache; is_timed: whether its speed was
    measured; measured_memory: the most bytes of its process then.

    smallest_group: GPUs that hold a copy; None: not known, or a CPU. operations: floating-point, of the whole pass.
    hours: of each of `copies` copies; device_hours: of all GPUs (or CPU jobs) together. slots: jobs of each copy.
    """

    id: str
    name: str
    parameters: int
    active_parameters: int
    dtype: str
    memory: TeacherMemory
    measured_memory: int | None
    gpus_per_model: int
    smallest_group: int | None
    copies: int
    operations: float
    hours: float
    device_hours: float
    is_timed: bool
    slots: int


class StudentMemory(Entry):
    """Bytes of a student in training, on each of its GPUs; `peak`: at the fullest moment. program: as of a teacher."""

    program: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    peak: int


class RunEstimate(Entry):
    """The training of a student. tokens: that it reads in all steps; memory: as configured, without and with
    recomputation (`use_gradient_checkpointing`). epochs: passes over the text; is_timed: whether steps were measured,
    and measured_memory: the most bytes of their process.
    """

    name: str
    parameters: int
    trained_parameters: int
    is_checkpointed: bool
    layout: str
    memory: StudentMemory
    measured_memory: int | None
    memory_plain: StudentMemory
    memory_checkpointed: StudentMemory
    steps: int
    tokens: int
    epochs: float
    operations: float
    hours: float
    device_hours: float
    is_timed: bool
    slots: int


class BreakEven(Entry):
    """The teacher's passes: once with a cache, or at every epoch of every student that learns from it alive.

    passes: epochs of all those students; the hours are of devices, the teacher's alone.
    """

    passes: float
    cached_hours: float
    live_hours: float


class Estimate(Record, format="retort-estimate", version=2):
    """What a config needs. made: when, in UTC; wall_hours: on `device.number`.

    faults: why it cannot run as it is, with what to change.
    """

    made: str
    device: Device
    texts: tuple[TextEstimate, ...]
    caches: tuple[CacheEstimate, ...]
    teachers: tuple[TeacherEstimate, ...]
    runs: tuple[RunEstimate, ...]
    break_even: BreakEven | None
    device_hours: float
    wall_hours: float
    price: float | None
    assumptions: tuple[str, ...]
    faults: tuple[str, ...]
