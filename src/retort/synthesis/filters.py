"""Filters of answers: each answer is kept as a document, or dropped for the first reason that applies.

The result depends on the answers in the order of their prompts, never on the order in which they arrived.
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
from retort.synthesis.contamination import ProblemNgrams, list_ngrams, split_words
from retort.synthesis.prompts import LabeledPrompt
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

# Chat models refuse in these words, at the beginning of the answer.
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
_MAX_INDEX_THRESHOLD = 0.9  # the index cannot resolve higher ones; each match is compared exactly
# Below these the detector is a guess.
_MIN_LETTERS = 60
_MIN_PROBABILITY = 0.9
_LANGUAGES = {
    "arabic": "ar", "bengali": "bn", "bulgarian": "bg", "catalan": "ca", "chinese": "zh", "croatian": "hr",
    "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "finnish": "fi", "french": "fr", "german": "de",
    "greek": "el", "hebrew": "he", "hindi": "hi", "hungarian": "hu", "indonesian": "id", "italian": "it",
    "japanese": "ja", "korean": "ko", "norwegian": "no", "persian": "fa", "polish": "pl", "portuguese": "pt",
    "romanian": "ro", "russian": "ru", "slovak": "sk", "spanish": "es", "swedish": "sv", "thai": "th",
    "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi",
}  # fmt: skip
# The grammar of a language, by the names after a fence.
_GRAMMARS = {
    "javascript": "javascript", "js": "javascript", "jsx": "javascript", "java": "java", "c": "c", "cpp": "cpp",
    "c++": "cpp", "go": "go", "golang": "go", "rust": "rust", "rs": "rust", "bash": "bash", "sh": "bash",
}  # fmt: skip
_PYTHON = ("python", "python3", "py")


def require_filters(section: Synthesis) -> None:
    """Raise ValueError when a filter's package is not installed, or `response_language` is unknown."""
    needed = {
        "near_duplicates": ("datasketch", section.near_duplicates is not None, "null"),
        "check_language": ("py3langid", section.check_language, "false"),
    }
    for key, (package, is_needed, off) in needed.items():
        if is_needed and find_spec(package) is None:
            raise ValueError(
                f"synthesis.{key} needs {package}, which is not installed. Type: pip install "
                f"'{PACKAGES[package]}' (or the extra synth), or set synthesis.{key}: {off}."
            )
    language = section.response_language
    if section.check_language and language and _language_code(language) is None:
        raise ValueError(
            f"Unknown synthesis.response_language {language!r}. Use one of {', '.join(sorted(_LANGUAGES))}, or its "
            "code, such as en; or set synthesis.check_language: false."
        )


class AnswerFilter:
    """Checks answers, in the order of their prompts; counts the dropped ones by reason."""

    def __init__(self, section: Synthesis, problems: ProblemNgrams) -> None:
        self.section, self.problems = section, problems
        self.counts = dict.fromkeys(REASONS, 0)
        self._seen: set[str] = set()
        self._near = _NearDuplicates(section.near_duplicates) if section.near_duplicates else None

    def check(self, index: int, prompt: LabeledPrompt, answer: Answer | None) -> str | None:
        """Return why an answer is dropped (one of REASONS), or None when it is kept.

        `answer` is None for a prompt that the server rejected.
        """
        reason = self._find_reason(index, prompt, answer)
        if reason is not None:
            self.counts[reason] += 1
        return reason

    def _find_reason(self, index: int, prompt: LabeledPrompt, answer: Answer | None) -> str | None:
        if answer is None:
            return "rejected"
        section = self.section
        checks: dict[str, Callable[[], bool]] = {
            "refused": lambda: not section.keep_refusals and is_refusal(answer),
            "empty": lambda: not answer.text.strip(),
            "truncated": lambda: not section.keep_truncated and answer.finish == "length",
            "too_short": lambda: len(answer.text) < section.min_characters,
            "too_long": lambda: len(answer.text) > (section.max_characters or len(answer.text)),
            "wrong_language": lambda: section.check_language and self._is_foreign(prompt, answer),
            "broken_code": lambda: section.check_code and has_broken_code(answer.text),
            "contaminated": lambda: any(map(self.problems.overlaps, (prompt.text, answer.text))),
            "duplicate": lambda: self._is_duplicate(answer) and not section.keep_duplicates,
            "near_duplicate": lambda: (
                self._near is not None
                and self._near.find_or_add(index, f"{prompt.text}\n{answer.text}")
            ),
        }
        return next((reason for reason, is_dropped in checks.items() if is_dropped()), None)

    def _is_foreign(self, prompt: LabeledPrompt, answer: Answer) -> bool:
        code = _language_code(self.section.response_language or prompt.language or "")
        return code is not None and detect_language(answer.text) not in (None, code)

    def _is_duplicate(self, answer: Answer) -> bool:
        """Return whether an earlier response is the same, except for white space; remember this one."""
        key = xxhash.xxh3_128_hexdigest(" ".join(answer.text.split()).encode("utf-8", "replace"))
        is_duplicate = key in self._seen
        self._seen.add(key)
        return is_duplicate


def _language_code(language: str) -> str | None:
    """Return the code of a human language, given its name or code; None for other words, such as python."""
    code = _LANGUAGES.get(language.casefold(), language.casefold())
    return code if code in _LANGUAGES.values() else None


def is_refusal(answer: Answer) -> bool:
    """Return whether a model declines to answer: the provider says so, or the answer begins like a refusal."""
    return (
        answer.finish == "refusal" or _REFUSAL.match(answer.text.replace("\u2019", "'")) is not None
    )


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> str | None:
    """Return the code of the human language of a text's prose; None when there is too little of it, or in doubt."""
    prose = _CODE.sub(" ", _FENCE.sub(" ", text))
    if sum(map(str.isalpha, prose)) < _MIN_LETTERS:
        return None
    valid = prose.encode("utf-8", "replace").decode()  # a lone surrogate, cut at max_tokens
    code, probability = _identifier().classify(valid)
    return str(code) if probability >= _MIN_PROBABILITY else None


def has_broken_code(text: str) -> bool:
    """Return whether a fenced block of code does not parse; blocks in languages without a parser here pass."""
    return any(not _parses(name.lower(), body) for name, body, _ in _FENCE.findall(text))


def _parses(name: str, code: str) -> bool:
    if name in _PYTHON:
        return code.lstrip().startswith(">>>") or _is_python(code)
    parser = _parser(_GRAMMARS[name]) if name in _GRAMMARS else None
    return parser is None or not parser.parse(code.encode("utf-8", "replace")).root_node.has_error


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of the response's code, such as "\d"
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@cache
def _parser(grammar: str) -> Any:
    """Return the parser of a grammar; None when its package is not installed."""
    if find_spec("tree_sitter") is None or find_spec(f"tree_sitter_{grammar}") is None:
        return None
    from tree_sitter import Language, Parser

    return Parser(Language(import_module(f"tree_sitter_{grammar}").language()))


def list_grammars() -> list[str]:
    """Return the programming languages that can be parsed on this machine."""
    return ["python", *sorted(g for g in set(_GRAMMARS.values()) if _parser(g) is not None)]


class _NearDuplicates:
    """MinHash with locality-sensitive hashing (Leskovec et al., Mining of Massive Datasets, chapter 3)."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.build_sketch, self.threshold = MinHash, threshold
        self.index = MinHashLSH(
            threshold=min(threshold, _MAX_INDEX_THRESHOLD), num_perm=_PERMUTATIONS
        )
        self.sketches: dict[int, Any] = {}

    def find_or_add(self, key: int, text: str) -> bool:
        """Return whether an added text has at least the threshold's Jaccard similarity; add this one if not."""
        words = split_words(text)
        size = min(_SHINGLE_WORDS, max(1, len(words)))
        sketch = self.build_sketch(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch(
            [" ".join(s).encode("utf-8", "replace") for s in set(list_ngrams(words, size))]
        )
        matches = (self.sketches[match] for match in self.index.query(sketch))
        if any(match.jaccard(sketch) >= self.threshold for match in matches):
            return True
        self.sketches[key] = sketch
        self.index.insert(key, sketch)
        return False
