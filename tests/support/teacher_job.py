"""The tiny corpus as work for workers of the teacher's pass, and their deadlines."""

from collections.abc import Callable
from pathlib import Path

import torch

from retort.cache.parts import (
    build_header,
    part_path,
)
from retort.cluster.deadlines import Deadline
from retort.io.fingerprints import TeacherRecord
from retort.models.causal_lm import CausalLM
from retort.models.load import load_recorded_teacher
from retort.teacher.claims import Claims
from retort.teacher.scoring import Scorer
from retort.teacher.worker import WorkerReport, run_worker
from retort.tokens.index import TokenIndex
from support.sections import section
from support.tiny import record, tokenize


class Job:
    """The parts of the tiny corpus, and what a worker needs to do them."""

    def __init__(self, folder: Path, corpus: Path, teacher_path: Path) -> None:
        self.index_path = tokenize(folder / "tokens", corpus, teacher_path)
        self.fingerprint = record(folder, teacher_path)
        self.teacher_path = str(teacher_path)
        self.index = TokenIndex.read(self.index_path)
        self.cache = section("cache", top_k=8)
        self.header = build_header(
            self.index, TeacherRecord.read(self.fingerprint), self.cache, source=self.fingerprint
        )

    def load(self) -> CausalLM:
        return load_recorded_teacher(
            self.teacher_path, section("teacher", device="cpu"), record_path=self.fingerprint
        )

    def work(
        self,
        folder: Path,
        *,
        worker: int = 0,
        num_workers: int = 1,
        load: Callable[[], CausalLM] | None = None,
        deadline: Deadline | None = None,
        claims: Claims | None = None,
    ) -> WorkerReport:
        torch.set_num_threads(1)
        return run_worker(
            self.index,
            folder,
            self.header,
            worker=worker,
            num_workers=num_workers,
            open_scorer=lambda: Scorer((load or self.load)(), 4),
            deadline=deadline,
            claims=claims,
        )

    def part_name(self, place: int) -> str:
        name: str = self.index.parts[place].name
        return name

    def part(self, folder: Path, place: int) -> Path:
        return part_path(folder, self.part_name(place), self.header)


def read_parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class After(Deadline):
    """A deadline that comes after being asked `looks` times."""

    def __init__(self, looks: int) -> None:
        super().__init__(ask=lambda: None)
        self.looks, self.asked = looks, list[float]()

    def forbids(self, seconds: float) -> bool:
        self.asked.append(seconds)
        return len(self.asked) > self.looks
