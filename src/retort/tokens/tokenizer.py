"""Tokenizers: load and identify them; encode prompts and messages."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retort.cli import first_line
from retort.io.digests import digest
from retort.io.files import is_path
from retort.io.fingerprints import TokenizerIdentity, describe_model_file, fingerprint_tokenizer
from retort.tokens.chat import DEFAULT_DATE, ChatFormat
from retort.tokens.controls import ControlTokens


def encode_prompt(prompt: str, tokenizer: Any, *, date: str = DEFAULT_DATE) -> list[int]:
    """Return the ids of a prompt, up to where the response begins: by the chat template, else as one line of text.

    date: what a template prints that prints today's.
    """
    if getattr(tokenizer, "chat_template", None):
        return ChatFormat(tokenizer, date=date).encode_prompt([{"role": "user", "content": prompt}])
    return encode_prefix(f"{prompt}\n", tokenizer)


def encode_prefix(text: str, tokenizer: Any, *, controls: ControlTokens | None = None) -> list[int]:
    """Return the ids of a text to be continued: with the tokenizer's special tokens, but no end-of-text token.

    controls: what control tokens written out in the text are; without it, tokens.
    """
    controls = controls or ControlTokens(tokenizer, as_text=False)
    ids = controls.encode_texts([text], add_special_tokens=True)[0]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@contextmanager
def without_torch() -> Iterator[None]:
    """Import transformers and load a tokenizer without importing PyTorch, which takes seconds and is not needed.

    None in `sys.modules` makes Python report a module as not found. It is removed after the block, because `datasets`
    imports torch if `sys.modules` has the key. PyTorch can be imported afterwards, but transformers offers no models in
    this process: do not use this where a user's code runs.
    """
    if {"torch", "transformers"} & sys.modules.keys():  # imported already: no time to save
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # the documented way to block an import
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return a tokenizer from a folder or a Hub id. Raises ValueError when it cannot be loaded."""
    from transformers import AutoTokenizer  # takes seconds

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, KeyError and errors of `tokenizers`
        raise ValueError(explain_load_error("tokenizer", path, error)) from error


def identify_tokenizer(path: str, tokenizer: Any) -> TokenizerIdentity:
    """Return the digest of a tokenizer's local files, or of a Hub tokenizer's vocabulary, and its size."""
    folder = Path(path)
    if folder.is_dir():
        fingerprint = fingerprint_tokenizer(folder)
    else:
        fingerprint = digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return TokenizerIdentity(fingerprint=fingerprint, size=len(tokenizer))


def refuse_other_tokenizer(found: TokenizerIdentity, *, expected: str | None, path: str) -> None:
    """Raise ValueError when a tokenizer's fingerprint (see `identify_tokenizer`) is not the expected one."""
    if expected not in (None, found.fingerprint):
        raise ValueError(
            f"the tokenizer in {path!r} changed since the command began: fingerprint {found.fingerprint}, "
            f"expected {expected}. Rerun the same command, which tokenizes the corpus with the new one."
        )


def explain_load_error(what: str, path: str, error: Exception) -> str:
    """Return a message for a model or tokenizer (`what`) that transformers cannot load."""
    if (Path(path) / "adapter_config.json").exists():
        advice = (
            "it holds an adapter of LoRA alone; give the merged model, such as final/ of the run"
        )
    elif Path(path).is_dir():
        advice = "the folder must contain what save_pretrained() writes (config.json, weights, tokenizer.json)"
    elif Path(path).is_file():
        advice = f"it is {describe_model_file(Path(path))}"
    elif is_path(path):
        advice = f"there is no such folder (looked in {Path.cwd()})"
    else:
        advice = (
            f"there is no such folder in {Path.cwd()}; a Hub id needs a connection to huggingface.co (or a "
            "cached copy, with HF_HUB_OFFLINE=1); if it is gated, log in with `hf auth login`"
        )
    return f"cannot load the {what} {path!r}: {advice}. transformers says: {first_line(error)}"
