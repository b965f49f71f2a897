"""Which answers become documents: each falls for one reason, the first that is found, or stays.

What stays depends on the answers in the order of their prompts, never on the order in which they came.
"""

import ast
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import xxhash

from retort.config.sections import Synthesis
from retort.synthesis.contamination import Runs, list_runs, split_words
from retort.synthesis.prompts import Prompt
from retort.synthesis.providers import Answer

REASONS = (
    "rejected",
    "empty",
    "refused",
    "truncated",
    "too_short",
    "too_long",
    "wrong_language",
    "broken_code",
    "contaminated",
    "duplicate",
    "near_duplicate",
)
PACKAGES = {"datasketch": "datasketch>=2.0", "py3langid": "py3langid>=0.4"}

# A refusal is said at the beginning, by these models in these words.
_REFUSAL = re.compile(
    r"\W*(i'm (very |really )?sorry,? (but )?(i|as)\b|i apologi[sz]e,? but i\b"
    r"|(sorry,? (but )?)?(i (can(no|')t|am (unable|not able)|won't|will not|must decline)|i'm (unable|not able))"
    r"[ -](to )?(help|assist|comply|fulfil+|provide|create|generate|write|answer|do|discuss|engage|support)\b"
    r"|as an ai( language)?( model| assistant)?,? i (can|am|do|don)[a-z']*)",
    re.IGNORECASE,
)
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)(^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_CODE = re.compile(r"`[^`\n]*`|https?://\S+")
_SHINGLE_WORDS = 5
_PERMUTATIONS = 128
_INDEXED = 0.9  # the index cannot tell apart what is more alike; each hit is compared by itself
# A detector guesses at less.
_LEAST_PROSE = 60
_LEAST_PROBABILITY = 0.9
_LANGUAGES = {
    "arabic": "ar", "bengali": "bn", "bulgarian": "bg", "catalan": "ca", "chinese": "zh", "croatian": "hr",
    "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "finnish": "fi", "french": "fr", "german": "de",
    "greek": "el", "hebrew": "he", "hindi": "hi", "hungarian": "hu", "indonesian": "id", "italian": "it",
    "japanese": "ja", "korean": "ko", "norwegian": "no", "persian": "fa", "polish": "pl", "portuguese": "pt",
    "romanian": "ro", "russian": "ru", "slovak": "sk", "spanish": "es", "swedish": "sv", "thai": "th",
    "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi",
}  # fmt: skip
# The grammar of a language, by the names that follow a fence.
_GRAMMARS = {
    "javascript": "javascript", "js": "javascript", "jsx": "javascript", "java": "java", "c": "c", "cpp": "cpp",
    "c++": "cpp", "go": "go", "golang": "go", "rust": "rust", "rs": "rust", "bash": "bash", "sh": "bash",
}  # fmt: skip
_PYTHON = ("python", "python3", "py")


def require_filters(section: Synthesis) -> None:
    """Raise ValueError where a filter's library is missing, with the line that installs it, or a language unknown."""
    wanted = {
        "datasketch": section.near_duplicates is not None,
        "py3langid": section.check_language,
    }
    keys = {"datasketch": "near_duplicates", "py3langid": "check_language"}
    for name, is_wanted in wanted.items():
        if is_wanted and find_spec(name) is None:
            off = "null" if name == "datasketch" else "false"
            raise ValueError(
                f"synthesis.{keys[name]} needs {name}, which is not installed here. Type: pip install "
                f"'{PACKAGES[name]}' (or the extra synth), or set synthesis.{keys[name]}: {off}."
            )
    wanted_language = section.response_language
    if section.check_language and wanted_language and _code_of(wanted_language) is None:
        raise ValueError(
            f"synthesis.response_language is {wanted_language!r}, but known are {', '.join(sorted(_LANGUAGES))} and "
            "their codes, such as en. Write one of these, or set synthesis.check_language: false."
        )


class Sieve:
    """Takes the answers in the order of their prompts, and says for each why it falls, or None."""

    def __init__(self, section: Synthesis, runs: Runs) -> None:
        self.section, self.runs = section, runs
        self.counts = dict.fromkeys(REASONS, 0)
        self._seen: set[str] = set()
        self._near = _NearDuplicates(section.near_duplicates) if section.near_duplicates else None

    def sift(self, place: int, prompt: Prompt, answer: Answer | None) -> str | None:
        """Return why an answer falls (one of REASONS), None where it stays; count it. None is a rejected prompt."""
        reason = self._find_reason(place, prompt, answer)
        if reason is not None:
            self.counts[reason] += 1
        return reason

    def _find_reason(self, place: int, prompt: Prompt, answer: Answer | None) -> str | None:
        if answer is None:
            return "rejected"
        section = self.section
        own: dict[str, Callable[[], bool]] = {
            "refused": lambda: not section.keep_refusals and is_refusal(answer),
            "empty": lambda: not answer.text.strip(),
            "truncated": lambda: not section.keep_truncated and answer.finish == "length",
            "too_short": lambda: len(answer.text) < section.min_characters,
            "too_long": lambda: len(answer.text) > (section.max_characters or len(answer.text)),
            "wrong_language": lambda: section.check_language and self._is_foreign(prompt, answer),
            "broken_code": lambda: section.check_code and has_broken_code(answer.text),
            "contaminated": lambda: self.runs.is_in(prompt.text) or self.runs.is_in(answer.text),
            "duplicate": lambda: self._is_copy(answer) and not section.keep_duplicates,
            "near_duplicate": lambda: (
                self._near is not None and self._near.has(place, f"{prompt.text}\n{answer.text}")
            ),
        }
        return next((reason for reason, falls in own.items() if falls()), None)

    def _is_foreign(self, prompt: Prompt, answer: Answer) -> bool:
        code = _code_of(self.section.response_language or prompt.language or "")
        return code is not None and detect_language(answer.text) not in (None, code)

    def _is_copy(self, answer: Answer) -> bool:
        """Say whether another prompt had the same response, but for white space."""
        key = xxhash.xxh3_128_hexdigest(" ".join(answer.text.split()).encode("utf-8", "replace"))
        is_copy = key in self._seen
        self._seen.add(key)
        return is_copy


def _code_of(language: str) -> str | None:
    """Return the code of a human language, of its name or code; None for another word, as python."""
    code = _LANGUAGES.get(language.casefold(), language.casefold())
    return code if code in _LANGUAGES.values() else None


def is_refusal(answer: Answer) -> bool:
    """Say whether a model declines to answer: by the provider's word, or by how the answer begins."""
    return (
        answer.finish == "refusal" or _REFUSAL.match(answer.text.replace("\u2019", "'")) is not None
    )


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> str | None:
    """Return the code of the human language that a text's prose is in; None for too little of it, or in doubt."""
    prose = _CODE.sub(" ", _FENCE.sub(" ", text))
    if sum(map(str.isalpha, prose)) < _LEAST_PROSE:
        return None
    whole = prose.encode("utf-8", "replace").decode()  # half a character, cut at the end, is none
    code, probability = _identifier().classify(whole)
    return str(code) if probability >= _LEAST_PROBABILITY else None


def has_broken_code(text: str) -> bool:
    """Say whether a fenced block of a language that can be parsed here does not parse."""
    return any(not _parses(name.lower(), body) for name, body, _ in _FENCE.findall(text))


def _parses(name: str, code: str) -> bool:
    if name in _PYTHON:
        return code.lstrip().startswith(">>>") or _is_python(code)
    parser = _parser(_GRAMMARS[name]) if name in _GRAMMARS else None
    return parser is None or not parser.parse(code.encode("utf-8", "replace")).root_node.has_error


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a "\d", say, to nobody who wrote it
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@cache
def _parser(grammar: str) -> Any:
    """Return the parser of a grammar; None where its package is not installed."""
    if find_spec("tree_sitter") is None or find_spec(f"tree_sitter_{grammar}") is None:
        return None
    from tree_sitter import Language, Parser

    return Parser(Language(import_module(f"tree_sitter_{grammar}").language()))


def list_grammars() -> list[str]:
    """Return the languages whose code is parsed on this machine."""
    return ["python", *sorted(g for g in set(_GRAMMARS.values()) if _parser(g) is not None)]


class _NearDuplicates:
    """MinHash with locality-sensitive hashing (Leskovec et al., Mining of Massive Datasets, chapter 3)."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.make, self.threshold = MinHash, threshold
        self.index = MinHashLSH(threshold=min(threshold, _INDEXED), num_perm=_PERMUTATIONS)
        self.kept: dict[int, Any] = {}

    def has(self, place: int, text: str) -> bool:
        """Say whether a text is as like as the threshold to one that was kept; else keep it."""
        words = split_words(text)
        size = min(_SHINGLE_WORDS, max(1, len(words)))
        sketch = self.make(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch(
            [" ".join(run).encode("utf-8", "replace") for run in set(list_runs(words, size))]
        )
        if any(self.kept[k].jaccard(sketch) >= self.threshold for k in self.index.query(sketch)):
            return True
        self.kept[place] = sketch
        self.index.insert(place, sketch)
        return False
