"""A small tokenizer of SentencePiece's kind, and sequences in which every token of a text is predicted."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from retort.corpus.documents import Document
from retort.evaluation.text_bytes import count_next_bytes
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from support.sections import section


def make_piece_tokenizer(*, with_prefix: bool, with_space: bool = True) -> Any:
    """Return a tokenizer like Llama 2's: SentencePiece pieces with byte fallback; `with_space`: a token for a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [*(["\u2581"] if with_space else []), *"abcdefghijklmnopqrstuvwxyzTQ."]
    pieces += ["\u2581T", "h", "he", "\u2581The", "\u2581ok"]
    names = [*dict.fromkeys(pieces), "\u2581o"]
    merges = [("\u2581", "T"), ("h", "e"), ("\u2581T", "he"), ("\u2581", "o"), ("\u2581o", "k")]
    merges = merges if with_space else [("h", "e")]
    ids = {name: i for i, name in enumerate(names)}
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    before = [normalizers.Prepend("\u2581")] if with_prefix else []
    bpe.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    after = [decoders.Strip(" ", 1, 0)] if with_prefix else []
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tokenize_after_special(tokenizer: Any, text: str) -> SequenceTable:
    """Return the text as one sequence after a special token, so that each token of the text is predicted."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    mask = [True] * len(ids) + [False]
    return build_table([([begin, *ids], mask, 0, ("", ""))])


def _finish(tokenizer: Any) -> Any:
    """Return the tokenizer with a begin token in front of every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_byte_level(*, prefix: bool = False, normalizer: Any = None) -> Any:
    """Return a byte-level tokenizer like GPT-2's, without merges."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _finish(tokenizer)


def make_metaspace(scheme: str, *, normalizer: Any = None) -> Any:
    """Return SentencePiece pieces whose spaces are made by a pre-tokenizer, as in T5 and newer Llama 2."""
    tokenizer = make_piece_tokenizer(with_prefix=False).backend_tokenizer
    tokenizer.normalizer = normalizer
    space: dict[str, Any] = {"prepend_scheme": scheme, "split": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**space)])
    return _finish(tokenizer)


def make_word_pieces() -> Any:
    """Return a tokenizer like BERT's: words of letters, and pieces of words after ##."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", "\u6771", "\u4eac"]
    names = ["<unk>", "<s>", "</s>", *letters, *(f"##{letter}" for letter in letters)]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer)


KINDS: dict[str, Any] = {
    "byte level": make_byte_level,
    "byte level, NFC": lambda: make_byte_level(normalizer=normalizers.NFC()),
    "byte level, prefix": lambda: make_byte_level(prefix=True),
    "pieces": lambda: _finish(make_piece_tokenizer(with_prefix=True).backend_tokenizer),
    "pieces without prefix": lambda: _finish(
        make_piece_tokenizer(with_prefix=False).backend_tokenizer
    ),
    "pieces without a space": lambda: _finish(
        make_piece_tokenizer(with_prefix=True, with_space=False).backend_tokenizer
    ),
    "pieces without both": lambda: _finish(
        make_piece_tokenizer(with_prefix=False, with_space=False).backend_tokenizer
    ),
    "metaspace always": lambda: make_metaspace("always"),
    "metaspace first": lambda: make_metaspace("first"),
    "metaspace, NFKC": lambda: make_metaspace("always", normalizer=normalizers.NFKC()),
    "word pieces": make_word_pieces,
    "ByT5": ByT5Tokenizer,
}


def measure_text(tokenizer: Any, text: str, *, prompt: str | None) -> int | str:
    """Return the bytes of all predicted tokens of a document, or why they are not defined.

    Every token of the text is predicted: after a prompt, or after a begin token.
    """
    keys = {} if prompt is None else {"prompt_column": "prompt", "response_column": "text"}
    dataset = section("dataset", max_length=16, **keys)
    document = Document(0, text, prompt, None, None, "val")
    counts = TokenCounts()
    table = tokenize_documents([document], tokenizer, dataset, counts=counts)
    found = count_next_bytes(table, tokenizer, changed=counts.held_out_normalized)
    return found if isinstance(found, str) else int(found.sum())
