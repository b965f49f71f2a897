"""Decontamination: problems of the benchmarks that a student is evaluated on must not be in its training text.

A text is contaminated when it shares an n-gram of words with a problem; n is `decontamination_words` (13, as for GPT-3:
Brown et al., 2020, arXiv 2005.14165, appendix C). Words are in lower case, without punctuation. A text of fewer than
n words, but at least five, counts as one n-gram.
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

# Han and kana have no spaces between words: each character counts as a word.
_CJK = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
# Invisible characters that may occur within a word: the soft hyphen, zero-width ones.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_MIN_WORDS = 5


class ProblemNgrams:
    """The word n-grams of a set of problems."""

    def __init__(self, texts: Iterable[str], *, length: int) -> None:
        self.by_length: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            words = split_words(text)
            size = min(length, len(words))
            if size >= min(_MIN_WORDS, length):
                self.by_length.setdefault(size, set()).update(list_ngrams(words, size))

    def overlaps(self, text: str) -> bool:
        """Return whether a text has an n-gram of a problem."""
        words = split_words(text)
        return any(
            ngram in known
            for size, known in self.by_length.items()
            for ngram in list_ngrams(words, size)
        )


def split_words(text: str) -> list[str]:
    """Return the words of a text, NFKC-normalized, in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).translate(_INVISIBLE).casefold())


def list_ngrams(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """Yield every n-gram of this length, in order."""
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def read_benchmarks(evaluation: Evaluation) -> tuple[list[str], list[str]]:
    """Return (texts of the problems of all `evaluation.benchmarks.tasks`, names of those that cannot be read here)."""
    texts: list[str] = []
    missing: list[str] = []
    for name in evaluation.benchmarks.tasks:
        try:
            texts += _read_problems(name, evaluation)
        except ValueError as error:
            missing.append(name)
            logger.warning(
                f"the problems of {name} cannot be read here, so responses are NOT compared with them ({error})"
            )
    return texts, missing


def _read_problems(name: str, evaluation: Evaluation) -> list[str]:
    if name == HUMANEVAL:
        problems = read_problems(Path(str(evaluation.humaneval.file)))
        return [text for problem in problems for text in (problem.prompt, problem.test)]
    from retort.evaluation.harness import load_tasks  # loads torch, which nothing else here needs

    tasks = load_tasks(name, tasks_dir=evaluation.benchmarks.tasks_dir)["tasks"].values()
    return [text for task in tasks for doc in task.eval_docs for text in _read_doc(task, doc)]


def _read_doc(task: Any, doc: Any) -> list[str]:
    """Return the question and the right answer of one example, when they are texts."""
    found = [task.doc_to_text(doc), task.doc_to_target(doc)]
    return [text for text in found if isinstance(text, str)]
