"""Real parts, made small: a teacher with its tokenizer, a corpus, a student's config."""

import json
import logging
import random
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: the first example may load a library, and the machine may be busy.
# The same examples every time, so that nobody's change fails by an older fault; `make campaign` looks for new ones.
settings.register_profile("retort", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("campaign", deadline=None, max_examples=60)
settings.load_profile("retort")

# A shell lets its background jobs ignore SIGINT (`make test &`), and children inherit that: tests send it to theirs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

logging.getLogger("retort").setLevel(logging.DEBUG)  # caplog shows what a job's log would

REPOSITORY = Path(__file__).parents[1]

_WORDS = (
    "a able about again air all and animal answer back ball been bird blue book boy bread bring "
    "brown by call came can cat child city close cloud cold come corn cut dark day deep dog door "
    "down draw early earth east eat egg every eye face fall farm fast find fire fish five food for "
    "found fox friend from garden gave girl go good grass green grow had hand hard has head hear "
    "help her here high hill him his home horse house hundred idea in is island it jumps keep kind "
    "land late lazy leaf learn left letter light like little long made make man many map mark milk "
    "moon more morning mother move music name near new night north not now of old on open over own"
)
_TOKENIZER_SIZE = 300
_OUTPUT_WIDTH = 320  # wider than the tokenizer, as teachers' layers often are


def make_text(num_words: int, *, seed: int) -> str:
    """Return sentences of common words; the same for the same arguments on every machine."""
    chance = random.Random(seed)
    known = _WORDS.split()
    words = [chance.choice(known) for _ in range(num_words)]
    for place in range(0, num_words, 9):
        words[place] = words[place].capitalize()
    return " ".join(
        word + ("." if place % 9 == 8 or place == num_words - 1 else "")
        for place, word in enumerate(words)
    )


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of 120 documents of 2 to 160 words in the column `text`."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    chance = random.Random(0)
    rows = [{"text": make_text(int(2 * 80 ** chance.random()), seed=i)} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers and width 16, and a byte-level BPE of 300 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENIZER_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([make_text(2000, seed=-1)], trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=128, **special)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=_OUTPUT_WIDTH,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # at the usual 0.02 every distribution is nearly uniform
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's config as JSON: 1 layer of width 8."""
    path = tmp_path_factory.mktemp("student") / "student.json"
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of models and texts beside the repository; tests that need it skip where it is not."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real models and texts in {folder}")
    return folder
