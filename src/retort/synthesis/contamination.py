"""Problems that a student will be examined with must not be among what it learns: runs of words that they share.

A run is `decontamination_words` words (13, as for GPT-3: Brown et al., 2020, arXiv 2005.14165, appendix C), in lower
case, without punctuation; a text of a problem that is shorter, but of five words at least, is looked for as a whole.
"""

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retort.config.sections import HUMANEVAL, Evaluation
from retort.evaluation.humaneval import read_problems

logger = logging.getLogger(__name__)

# Han and kana stand without spaces between words: each sign counts as one.
_SIGNS = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+")
# Within a word, on no screen.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_FEWEST_WORDS = 5


class Runs:
    """The runs of words of a set of problems."""

    def __init__(self, texts: Iterable[str], *, length: int) -> None:
        self.by_length: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            words = split_words(text)
            size = min(length, len(words))
            if size >= min(_FEWEST_WORDS, length):
                self.by_length.setdefault(size, set()).update(list_runs(words, size))

    def is_in(self, text: str) -> bool:
        """Say whether a text has a run of a problem."""
        words = split_words(text)
        return any(
            run in known for size, known in self.by_length.items() for run in list_runs(words, size)
        )


def split_words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation, however their letters are composed."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).translate(_UNSEEN).casefold())


def list_runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of so many words."""
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def read_benchmarks(evaluation: Evaluation) -> tuple[list[str], list[str]]:
    """Return (texts of all problems of `evaluation.benchmarks`, names of those that could not be read here)."""
    texts: list[str] = []
    missing: list[str] = []
    for name in evaluation.benchmarks:
        try:
            texts += _read_problems(name, evaluation)
        except ValueError as error:
            missing.append(name)
            logger.warning(
                f"the problems of {name} cannot be read here, so responses are NOT compared with them "
                f"({error})"
            )
    return texts, missing


def _read_problems(name: str, evaluation: Evaluation) -> list[str]:
    if name == HUMANEVAL:
        problems = read_problems(Path(str(evaluation.humaneval_file)))
        return [text for problem in problems for text in (problem.prompt, problem.test)]
    from retort.evaluation.harness import load_tasks  # loads torch, which nothing else here needs

    tasks = load_tasks(name, tasks_dir=evaluation.benchmark_tasks_dir)["tasks"].values()
    return [text for task in tasks for doc in task.eval_docs for text in _read_doc(task, doc)]


def _read_doc(task: Any, doc: Any) -> list[str]:
    """Return the question and the right answer of one example, where they are texts."""
    found = [task.doc_to_text(doc), task.doc_to_target(doc)]
    return [text for text in found if isinstance(text, str)]
