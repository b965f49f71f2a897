"""A small tokenizer of SentencePiece's kind, and sequences in which every token of a text is predicted."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from retort.tokens.sequences import SequenceTable, build_table


def make_piece_tokenizer(*, with_prefix: bool) -> Any:
    """Return a tokenizer like Llama 2's: SentencePiece pieces with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzTQ."]
    pieces += ["\u2581T", "h", "he", "\u2581The", "\u2581ok"]
    names = [*dict.fromkeys(pieces), "\u2581o"]
    merges = [("\u2581", "T"), ("h", "e"), ("\u2581T", "he"), ("\u2581", "o"), ("\u2581o", "k")]
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
