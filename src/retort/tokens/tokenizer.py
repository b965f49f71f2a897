"""Tokenizers: loaded, fingerprinted, compared; prompts and messages encoded by them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retort.cli import first_line
from retort.io.digests import digest
from retort.io.files import is_path
from retort.io.fingerprints import fingerprint_tokenizer


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Return the ids after which a response begins: through the chat template, or, where there is none, a line."""
    if getattr(tokenizer, "chat_template", None):
        return encode_chat([{"role": "user", "content": prompt}], tokenizer)
    return encode_beginning(f"{prompt}\n", tokenizer)


def encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Return the ids of messages through the chat template, up to where the response begins."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(messages, **options))


def encode_beginning(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that goes on: with the special tokens that a text begins with, not with its end."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@contextmanager
def hidden_torch() -> Iterator[None]:
    """Let transformers be imported, and a tokenizer loaded, as where there is no PyTorch, which neither needs.

    None in `sys.modules` is how Python marks a module as not to be found. It is taken away at the end: a library that
    looks for "torch" in `sys.modules`, as `datasets` does, would import it and fail. From then on anyone may import
    PyTorch; transformers keeps to its tokenizers in this process, so this is not for one that runs a user's code.
    """
    if {"torch", "transformers"} & sys.modules.keys():  # imported already: no time to save
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a tokenizer from a folder or a Hub id. Raises ValueError with the next step when it cannot."""
    from transformers import AutoTokenizer  # seconds, and nothing else in this room needs it

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, and tokenizers' own
        raise ValueError(cannot_load("tokenizer", path, error)) from error


def fingerprint_of_tokenizer(path: str, tokenizer: Any) -> dict[str, Any]:
    """Return {"fingerprint", "size"} of a tokenizer: of its files where it is local, else of its vocabulary."""
    folder = Path(path)
    if folder.is_dir():
        fingerprint = fingerprint_tokenizer(folder)
    else:
        fingerprint = digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return {"fingerprint": fingerprint, "size": len(tokenizer)}


def refuse_other_tokenizer(found: dict[str, Any], *, expected: str | None, path: str) -> None:
    """Raise ValueError when a tokenizer's fingerprint is not the one that the tokens are named by."""
    if expected not in (None, found["fingerprint"]):
        raise ValueError(
            f"the tokenizer in {path!r} changed since the command began (fingerprint {found['fingerprint']}, then "
            f"{expected}), and the tokens are named by what it was. Run the same command again: it makes others."
        )


def cannot_load(what: str, path: str, error: Exception) -> str:
    """Return the sentence for a model or a tokenizer that transformers cannot load."""
    if Path(path).is_dir():
        advice = "the folder must hold what save_pretrained() writes (config.json, weights, tokenizer.json)"
    elif is_path(path):
        advice = f"there is no such folder (looked from {Path.cwd()})"
    else:
        advice = (
            f"there is no such folder in {Path.cwd()}, and for a Hub id this machine must reach huggingface.co (or "
            "have it in its cache, with HF_HUB_OFFLINE=1); "
            "for a gated one, log in with `hf auth login`"
        )
    return f"cannot load the {what} {path!r}: {advice}. transformers says: {first_line(error)}"
