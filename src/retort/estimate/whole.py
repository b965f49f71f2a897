"""The estimate of a whole config: text, caches, teachers and students, and what they take together."""

import heapq
import time
from collections.abc import Sequence

import torch

from retort.artifacts.project import Project, Run
from retort.config.load import identity
from retort.config.sections import Config
from retort.estimate.apart import call_apart
from retort.estimate.faults import find_faults, is_live
from retort.estimate.options import Measured, Models, Options
from retort.estimate.records import BreakEven, Device, Estimate, RunEstimate
from retort.estimate.sizes import ModelSize, measure_model
from retort.estimate.students import estimate_run
from retort.estimate.teachers import TeacherWork, estimate_teacher
from retort.estimate.text import Text, count_text
from retort.io.digests import digest
from retort.io.run_record import name_cpu

_TIMED_PARAMETERS = {"cpu": 200e6, "cuda": 4e9}  # of a student that is built to time its steps
_MATRIX = 1024  # rows of the product that a CPU is timed with


def estimate_project(project: Project, models: Models, options: Options) -> Estimate:
    """Return the estimate of all that a config makes.

    Raises ValueError where its text cannot be counted, and where a model cannot be built.
    """
    peak = find_peak(options)
    texts = {
        id: count_text(
            tokens, models.tokenizers[id], given=options.tokens, is_quick=options.is_quick
        )
        for id, tokens in project.tokens.items()
    }
    sizes = {id: measure_model(config) for id, config in models.teachers.items()}
    works = {
        id: estimate_teacher(
            logits,
            sizes[logits.teacher.id],
            texts[logits.tokens.id],
            options,
            num_tokens=_count_tokens(models, logits.tokens.id, sizes[logits.teacher.id]),
            peak=peak,
        )
        for id, logits in project.logits.items()
    }
    students = {name: measure_model(config) for name, config in models.students.items()}
    measured = _time_students(project, models, students, texts, options)
    runs = [
        estimate_run(
            run,
            students[name],
            _find_live(run, sizes),
            texts[run.tokens.id],
            options,
            peak=peak,
            measured=measured.get(name),
        )
        for name, run in project.runs.items()
    ]
    teachers = [work.teacher for work in works.values()]
    device_hours = sum(t.device_hours for t in teachers) + sum(r.device_hours for r in runs)
    return Estimate(
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=Device(
            name=options.gpu.name if options.gpu else f"{name_cpu()}, cores",
            number=options.num_devices,
            memory=options.gpu.memory if options.gpu else None,
            peak=peak,
        ),
        texts=tuple(text.estimate for text in texts.values()),
        caches=tuple(work.cache for work in works.values()),
        teachers=tuple(teachers),
        runs=tuple(runs),
        break_even=_compare_live(project, works, runs),
        device_hours=device_hours,
        wall_hours=sum(t.hours for t in teachers) + _schedule(project, runs, options),
        price=None if options.price is None else round(options.price * device_hours, 2),
        assumptions=tuple(_list_assumptions(options, works, measured)),
        faults=tuple(find_faults(project, works, sizes, runs, options)),
    )


def find_peak(options: Options) -> float:
    """Return operations a second of a device: a GPU's as its data sheet has it, a core's as a product of matrices has.

    Raises ValueError for a GPU whose speed is not known.
    """
    if options.gpu is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        left, best = torch.ones(_MATRIX, _MATRIX), float("inf")
        for _ in range(3):
            started = time.perf_counter()
            left @ left
            best = min(best, time.perf_counter() - started)
        torch.set_num_threads(threads)
        return 2 * _MATRIX**3 / best
    if options.gpu.peak is None:
        raise ValueError(
            f"the speed of the GPU {options.gpu.name!r} is not known here: name one that is like it with --gpu."
        )
    return options.gpu.peak


def _count_tokens(models: Models, id: str, teacher: ModelSize) -> int:
    tokenizer = models.tokenizers[id]
    return teacher.vocabulary if tokenizer is None else len(tokenizer)


def _find_live(run: Run, sizes: dict[str, ModelSize]) -> ModelSize | None:
    """Return the size of the teacher that runs beside a student, None without one."""
    return sizes[run.teacher.id] if run.teacher and is_live(run) else None


def _time_students(
    project: Project,
    models: Models,
    sizes: dict[str, ModelSize],
    texts: dict[str, Text],
    options: Options,
) -> dict[str, Measured]:
    """Return what was measured of the steps of runs, by name; those that differ in their loss share it."""
    found = dict(options.rates.student)
    known: dict[str, Measured | None] = {}
    for name, run in project.runs.items():
        text, tokenizer = texts[run.tokens.id], models.tokenizers[run.tokens.id]
        config = run.config
        is_small = sizes[name].parameters <= _TIMED_PARAMETERS[options.device]
        can_run = options.may_run and is_small and hasattr(tokenizer, "encode") and not run.pruned
        if name in found or not can_run or len(text.table) < 2 or is_live(run):
            continue
        key = digest([identity(config.student), _speed_keys(config), run.tokens.id])
        if key not in known:
            # Here, since transformers' Trainer takes seconds to load, and check_inputs times no student.
            from retort.estimate.student_speed import time_student

            known[key] = call_apart(
                time_student,
                config.student,
                config.training,
                text.table,
                tokenizer=tokenizer,
                vocabulary=_count_tokens(models, run.tokens.id, sizes[name]),
                max_length=config.dataset.max_length,
            )
        if (steps := known[key]) is not None:
            found[name] = steps
    return found


def _speed_keys(config: Config) -> dict[str, object]:
    names = (
        "batch_size gradient_accumulation_steps optim packing padding_free lora freeze attn_implementation "
        "torch_compile use_gradient_checkpointing use_mixed_precision mixed_precision_dtype cpu_threads"
    )
    return {name: str(getattr(config.training, name)) for name in names.split()}


def _compare_live(
    project: Project, works: dict[str, TeacherWork], runs: Sequence[RunEstimate]
) -> BreakEven | None:
    """Return the teacher's hours with its caches, and with a live teacher in their place; None without a cache."""
    epochs = {run.name: run.epochs for run in runs}
    users = [
        run for run in project.runs.values() if run.logits and run.config.training.needs_teacher
    ]
    if not users:
        return None
    live = sum(
        epochs[run.name] * works[logits.id].teacher.device_hours
        for run in users
        for logits in run.logits
    )
    return BreakEven(
        passes=round(sum(epochs[run.name] for run in users), 3),
        cached_hours=sum(work.teacher.device_hours for work in works.values()),
        live_hours=live,
    )


def _schedule(project: Project, runs: Sequence[RunEstimate], options: Options) -> float:
    """Return the hours in which all students are trained, the longest first, side by side where devices are free."""
    ends: list[float] = []
    for run in sorted(runs, key=lambda run: -run.hours):
        training = project.runs[run.name].config.training
        devices = training.gpus * training.nodes if options.gpu else training.cpu_threads
        places = max(1, options.num_devices // max(1, devices))
        start = heapq.heappop(ends) if len(ends) >= places else 0.0
        heapq.heappush(ends, start + run.hours)
    return max(ends, default=0.0)


def _list_assumptions(
    options: Options, works: dict[str, TeacherWork], measured: dict[str, Measured]
) -> list[str]:
    """Return what the estimate takes for granted, in sentences."""
    here = "measured here on a sample"
    lines = []
    if options.gpu:
        lines.append(
            f"GPUs of {options.gpu.memory / 1e9:.0f} GB, of which tensors can have {options.gpu.usable / 1e9:.1f} GB"
        )
    is_timed = any(work.teacher.is_timed for work in works.values())
    for what, source, share in (
        ("teacher", here if is_timed else "", options.forward_share),
        ("students", (options.rates.source or here) if measured else "", options.training_share),
    ):
        rate = f"{share:.0%} of the peak ({'given' if options.utilization else 'assumed'})"
        lines.append(f"speed of the {what}: {source or rate}")
    if not options.gpu:
        lines.append("cores that nothing else uses: beside other work it takes longer")
        lines.append(
            "memory that is not measured: what is in use; the C library keeps up to a half more of what was freed"
        )
    lines += [
        "operations: 2 a weight and token forward, 4 backward, 2 for recomputation, and 4 L T H for attention of all "
        "pairs of tokens",
        "a step's time is the student's alone: the cache is read ahead of it",
        "hours of downloads, tokenization, held-out scores, merging, evaluation and waiting in queues are not counted",
    ]
    if any(work.cost.basis == "table" for work in works.values()):
        lines.append(
            "the cache's bytes are those of a usual teacher (2.1 nats of entropy): others take a third to three times "
            "as many. The rule plan measures this teacher's, and checks the disk, before its pass begins"
        )
    return lines
