"""Make a 32,768-token teacher's distributions from text found on this machine: offline, on the CPU, in minutes.

    python benchmarks/cache_logits.py [--out FOLDER] [--quick] [--vocabulary 131072 --sequences 8]

What the cache benchmark compresses. The teacher is a mixture: a small GPT, n-grams up to order 5, and the
n-grams of the sequence itself so far (the copying that a large model does), each fitted on text of its own; then
one temperature for all positions, chosen so that 50 draws from a position have 12.3 different ids on average, as
RS-KD (arXiv 2503.16870) reports of its real teachers. The folder holds, for S held-out sequences of T tokens
(P = S * T positions, position s * T + t being token t of sequence s) and a vocabulary of V:

    tokens.npy          int32 [S, T]    what the teacher read
    next_tokens.npy     int32 [P]       the token that follows each position
    logprobs.npy        float32 [P, V]  natural log; memory-mappable
    unigram_counts.npy  int64 [V]       of the training text
    tokenizer.json      the byte-level BPE
    settings.json       what it was made of and what was measured; written last, compared before it is made again
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from retort import demo_text

# Read as whole sources, beside the standard library; `retort.demo_text` gives the documentation of four more.
# All are pinned in requirements.lock. transformers repeats itself too much to be held out.
PACKAGES = (
    *(
        "PIL",
        "accelerate",
        "datasets",
        "docutils",
        "fontTools",
        "fsspec",
        "h5py",
        "huggingface_hub",
        "hypothesis",
    ),
    *("jinja2", "mpmath", "networkx", "pyarrow", "snakemake", "sqlalchemy", "sympy"),
)
SUFFIXES = frozenset({".py", ".rst", ".txt", ".md"})
TEST_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "__pycache__"})
MAX_FILE_BYTES = 300_000  # longer files are tables
END_OF_TEXT = "<|endoftext|>"
UNIQUE_TARGET = 12.3  # different ids in NUM_DRAWS draws: RS-KD's table has 12.1 at 50 draws
NUM_DRAWS = 50
_HASH_FACTOR = np.int64(0x5851F42D4C957F2D)  # Knuth's, of MMIX; odd: no token's bits are lost


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that the distributions depend on, besides the text. `quick` changes some: see `QUICK`."""

    vocabulary: int = 32_768
    sequence_length: int = 512
    num_sequences: int = 32  # measured on; P = num_sequences * sequence_length
    num_fit_sequences: int = 16  # held out too: the mixture's weights are fitted on these
    max_text_mb: int = 100
    held_out_of: int = 32  # one document in so many
    width: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_steps: int = 600
    batch_size: int = 4  # sequences in a step
    num_candidates: int = 4096  # ids drawn for a step's sampled softmax
    learning_rate: float = 2e-3
    seed: int = 0


QUICK = {"num_steps": 25, "num_sequences": 16, "num_fit_sequences": 4, "max_text_mb": 16}


@dataclasses.dataclass(frozen=True)
class Distributions:
    """The folder's arrays; logprobs is mapped, not read. `measured` is settings.json's entry of that name."""

    tokens: NDArray[np.int32]  # [S, T]
    next_tokens: NDArray[np.int32]  # [P]
    logprobs: NDArray[np.float32]  # [P, V]
    unigram_counts: NDArray[np.int64]  # [V]
    measured: dict[str, Any]


def default_folder() -> Path:
    """Return the folder used without --out: under the user's cache, never in the repository."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "retort-benchmarks/logits-32k"
    )


def load(folder: Path) -> Distributions:
    """Open what `main` made."""
    described = json.loads((folder / "settings.json").read_text())
    return Distributions(
        np.load(folder / "tokens.npy"),
        np.load(folder / "next_tokens.npy"),
        np.load(folder / "logprobs.npy", mmap_mode="r"),
        np.load(folder / "unigram_counts.npy"),
        described["measured"],
    )


# --- text ---


def describe_text(settings: Settings) -> dict[str, Any]:
    """Return the settings and the versions of all whose text is read: equal entries, equal text."""
    installed = {name: _version(name) for name in PACKAGES if util.find_spec(name) is not None}
    return {
        "settings": dataclasses.asdict(settings),
        "python": platform.python_version(),
        "packages": installed | demo_text.describe_demo(),
    }


def _version(module: str) -> str:
    names = metadata.packages_distributions().get(module, [module])
    return f"{names[0]} {metadata.version(names[0])}"


def read_documents(settings: Settings) -> list[str]:
    """Return the documents, each once, in the order of a hash of their text, up to max_text_mb."""
    found: dict[int, str] = {}
    for text in (*demo_text.read_demo_text(seed=settings.seed), *_read_sources()):
        if len(text) >= 2000:
            found.setdefault(xxhash.xxh3_64_intdigest(text.encode(), settings.seed), text)
    documents, num_bytes = [], 0
    for _, text in sorted(found.items()):
        num_bytes += len(text.encode())
        if num_bytes > settings.max_text_mb * 1_000_000:
            break
        documents.append(text)
    return documents


def _read_sources() -> Iterator[str]:
    """Yield the text files of the standard library and of PACKAGES, without their tests."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        spec = util.find_spec(name)
        if spec is None or spec.origin is None:
            say(f"text: {name} is not installed, its text is missing")
        else:
            roots.append(Path(spec.origin).parent)
    for root in roots:
        for path in sorted(root.rglob("*")):
            within = path.relative_to(root).parts
            if (
                path.suffix not in SUFFIXES
                or not TEST_FOLDERS.isdisjoint(within)
                or not path.is_file()
            ):
                continue
            if path.stat().st_size <= MAX_FILE_BYTES:
                yield path.read_text(encoding="utf-8", errors="replace")


def split_documents(documents: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Return (training, held-out) documents: every held_out_of-th in hash order is held out."""
    held_out = documents[:: settings.held_out_of]
    training = [d for i, d in enumerate(documents) if i % settings.held_out_of]
    return training, held_out


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE; id 0 is END_OF_TEXT. It may have fewer than `vocabulary` ids on little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Long runs of one character (rules, padding) make long tokens of no use.
    shortened = (re.sub(r"([^\w\s])\1{7,}", r"\1\1\1\1", d) for d in documents)
    tokenizer.train_from_iterator(shortened, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> list[NDArray[np.int32]]:
    """Return each document's ids, END_OF_TEXT first."""
    encoded: list[NDArray[np.int32]] = []
    for start in range(0, len(documents), 256):
        batch = tokenizer.encode_batch(documents[start : start + 256])
        encoded.extend(np.array([0, *encoding.ids], np.int32) for encoding in batch)
    return encoded


def cut_sequences(
    encoded: list[NDArray[np.int32]], count: int, length: int, seed: int
) -> NDArray[np.int32]:
    """Return `count` runs of length + 1 ids, one of each document that is long enough, then a second one of each."""
    random = np.random.default_rng(seed)
    long = [ids for ids in encoded if len(ids) > 2 * length + 1]
    if not long or count > 4 * len(long):
        raise ValueError(
            f"{len(long)} held-out documents are long enough, for {count} sequences: read more text."
        )
    sequences = []
    for i in range(count):
        ids = long[i % len(long)]
        start = int(random.integers(len(ids) - length))
        sequences.append(ids[start : start + length + 1])
    return np.stack(sequences)


# --- the neural part ---


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


class TinyGPT(nn.Module):
    """A causal language model whose input and output embeddings are one table; the bias begins at the unigram."""

    def __init__(self, settings: Settings, log_unigram_V: torch.Tensor):
        super().__init__()
        self.table = nn.Embedding(len(log_unigram_V), settings.width)
        self.places = nn.Embedding(settings.sequence_length, settings.width)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.num_heads) for _ in range(settings.num_layers)
        )
        self.norm = nn.LayerNorm(settings.width)
        self.bias_V = nn.Parameter(log_unigram_V.clone())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            block.out.weight.data /= math.sqrt(2 * settings.num_layers)
            block.down.weight.data /= math.sqrt(2 * settings.num_layers)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [B, T, D]."""
        x_BTD = self.table(tokens_BT) + self.places.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)

    def compute_probs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the distributions [T, V] of the tokens that follow each position of one sequence."""
        with torch.no_grad():
            hidden_TD = self(torch.from_numpy(tokens_T).long()[None])[0]
            return torch.softmax(hidden_TD @ self.table.weight.T + self.bias_V, dim=-1).numpy()


def compute_sampled_loss(
    model: TinyGPT, batch_BT: torch.Tensor, unigram_V: torch.Tensor, num_candidates: int
) -> torch.Tensor:
    """Return the cross-entropy over the batch's own targets and ids drawn from the unigram.

    A softmax over all V would cost five times the rest of the model. Each candidate's logit is raised by minus
    the log of its chance to be one, which makes the sum over candidates an estimate of the sum over V.
    """
    targets = batch_BT[:, 1:].reshape(-1)
    drawn = torch.multinomial(unigram_V, num_candidates, replacement=True)
    candidates, where = torch.unique(torch.cat([targets, drawn]), return_inverse=True)
    chance = -torch.expm1(len(where) * torch.log1p(-unigram_V[candidates]))
    hidden = model(batch_BT[:, :-1]).flatten(0, 1)
    logits = hidden @ model.table(candidates).T + model.bias_V[candidates] - chance.log()
    return F.cross_entropy(logits, where[: len(targets)])


def train_gpt(
    stream: NDArray[np.int32], unigram_V: NDArray[np.float64], settings: Settings
) -> TinyGPT:
    """Train on random runs of the training text, num_steps steps."""
    torch.manual_seed(settings.seed)
    random = np.random.default_rng(settings.seed)
    unigram = torch.from_numpy(unigram_V).float()
    model = TinyGPT(settings, unigram.log())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    started, average = time.time(), math.nan
    for step in range(settings.num_steps):
        rate = min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / settings.num_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * max(rate, 0.02)
        starts = random.integers(
            len(stream) - settings.sequence_length - 1, size=settings.batch_size
        )
        batch = np.stack([stream[s : s + settings.sequence_length + 1] for s in starts])
        loss = compute_sampled_loss(
            model, torch.from_numpy(batch).long(), unigram, settings.num_candidates
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        if (step + 1) % max(1, settings.num_steps // 10) == 0:
            tokens_per_second = (step + 1) * batch[:, 1:].size / (time.time() - started)
            say(
                f"gpt: step {step + 1}/{settings.num_steps}, loss {average:.2f}, {tokens_per_second:.0f} tokens/s"
            )
    return model.eval()


# --- counts ---


class NextTokens:
    """What followed each context of `length` tokens in a text: one sorted array, looked up by bisection."""

    def __init__(self, stream: NDArray[np.int32], length: int):
        self.length = length
        keys = self.compute_keys(stream)[:-1]
        order = np.argsort(keys, kind="stable")
        self.keys, self.followers = keys[order], stream[length:][order]

    def compute_keys(self, stream: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return a hash of 64 bits for each run of `length` tokens; the i-th run ends at stream[i + length - 1]."""
        keys = np.zeros(max(0, len(stream) - self.length + 1), np.int64)
        for i in range(self.length):
            keys = keys * _HASH_FACTOR + stream[i : i + len(keys)] + 1
        return keys

    def look_up(self, sequence_T: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Return for each position of a sequence all tokens that followed its last `length` tokens (or none)."""
        keys = self.compute_keys(sequence_T)
        left, right = (
            np.searchsorted(self.keys, keys),
            np.searchsorted(self.keys, keys, side="right"),
        )
        found = [self.followers[a:b] for a, b in zip(left, right, strict=True)]
        return [self.followers[:0]] * (len(sequence_T) - len(found)) + found


def look_up_within(sequence_T: NDArray[np.int32], length: int) -> list[NDArray[np.int32]]:
    """Return for each position the tokens that followed its last `length` tokens earlier in the same sequence."""
    runs = np.lib.stride_tricks.sliding_window_view(sequence_T, length)
    found = [sequence_T[:0]] * (length - 1)
    for i in range(len(runs)):
        # Only followers that stand at or before the position itself: nothing of what is to be predicted.
        earlier = np.flatnonzero((runs[:i] == runs[i]).all(axis=1))
        found.append(sequence_T[earlier + length])
    return found


@dataclasses.dataclass(frozen=True)
class Mixture:
    """p0 = gpt_weight * gpt + (1 - gpt_weight) * unigram; then, for each kind of context, from short to long:
    p = (counts + m * p) / (num_counts + m). The last two kinds are contexts of 1 and 3 tokens of the sequence itself.
    """

    gpt_weight: float
    strengths: tuple[float, ...]  # m


def look_up_all(
    indexes: list[NextTokens], sequence_T: NDArray[np.int32]
) -> list[list[NDArray[np.int32]]]:
    """Return what followed, by kind of context and position."""
    return [index.look_up(sequence_T) for index in indexes] + [
        look_up_within(sequence_T, n) for n in (1, 3)
    ]


def mix(
    mixture: Mixture,
    gpt_TV: NDArray[np.float32],
    unigram_V: NDArray[np.float64],
    kinds: list[list[NDArray[np.int32]]],
) -> NDArray[np.float32]:
    """Return the mixture's distributions [T, V]."""
    mixed = np.empty_like(gpt_TV)
    for t in range(len(gpt_TV)):
        row = (
            mixture.gpt_weight * gpt_TV[t].astype(np.float64) + (1 - mixture.gpt_weight) * unigram_V
        )
        for followers, strength in zip((kind[t] for kind in kinds), mixture.strengths, strict=True):
            if len(followers) > 1000:
                row = (np.bincount(followers, minlength=len(row)) + strength * row) / (
                    len(followers) + strength
                )
            elif len(followers):
                row *= strength / (len(followers) + strength)
                np.add.at(row, followers, 1 / (len(followers) + strength))
        mixed[t] = row
    return mixed


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What each part says of the token that did follow, at P positions; enough to compute any mixture's loss."""

    gpt: NDArray[np.float64]  # [P] probabilities
    unigram: NDArray[np.float64]  # [P]
    counts: NDArray[np.int64]  # [kinds, P], how often it followed that context
    totals: NDArray[np.int64]  # [kinds, P], how often that context stood in the text


def gather_evidence(
    model: TinyGPT,
    indexes: list[NextTokens],
    unigram_V: NDArray[np.float64],
    sequences: NDArray[np.int32],
) -> Evidence:
    """Look up sequences that nothing was trained on."""
    gpt, counts, totals = [], [], []
    for sequence in sequences:
        targets = sequence[1:]
        kinds = look_up_all(indexes, sequence[:-1])
        gpt.append(model.compute_probs(sequence[:-1])[np.arange(len(targets)), targets])
        totals.append([[len(f) for f in kind] for kind in kinds])
        counts.append(
            [
                [np.count_nonzero(f == x) for f, x in zip(kind, targets, strict=True)]
                for kind in kinds
            ]
        )
    return Evidence(
        np.concatenate(gpt).astype(np.float64),
        unigram_V[sequences[:, 1:].reshape(-1)],
        np.concatenate(counts, axis=1),
        np.concatenate(totals, axis=1),
    )


def compute_loss(mixture: Mixture, evidence: Evidence) -> float:
    """Return the mixture's mean loss in nats."""
    p = mixture.gpt_weight * evidence.gpt + (1 - mixture.gpt_weight) * evidence.unigram
    for count, total, strength in zip(
        evidence.counts, evidence.totals, mixture.strengths, strict=True
    ):
        p = (count + strength * p) / (total + strength)
    return float(-np.log(p).mean())


def fit_mixture(evidence: Evidence) -> Mixture:
    """Return the weights with the least loss: one at a time over a grid, four times around."""

    def loss(mixture: Mixture) -> float:
        return compute_loss(mixture, evidence)

    weights = np.linspace(0.05, 0.999, 40).tolist()
    strengths = (
        *np.geomspace(0.3, 30_000, 60).tolist(),
        1e9,
    )  # 1e9: that context is not used at all
    best = Mixture(0.9, (10.0,) * len(evidence.counts))
    for _ in range(4):
        best = min((dataclasses.replace(best, gpt_weight=w) for w in weights), key=loss)
        for k in range(len(best.strengths)):
            before, after = best.strengths[:k], best.strengths[k + 1 :]
            best = min(
                (Mixture(best.gpt_weight, (*before, m, *after)) for m in strengths), key=loss
            )
    return best


# --- distributions ---


def count_unique(logprobs_PV: torch.Tensor) -> torch.Tensor:
    """Return the expected number of different ids in NUM_DRAWS draws with replacement, of each position."""
    return -torch.expm1(NUM_DRAWS * torch.log1p(-logprobs_PV.exp().clamp(max=1 - 1e-7))).sum(dim=-1)


def compute_mean_unique(logprobs_PV: NDArray[np.float32], temperature: float) -> float:
    """Return the mean over positions of `count_unique` at a temperature."""
    total = 0.0
    for start in range(0, len(logprobs_PV), 64):
        chunk = torch.from_numpy(np.array(logprobs_PV[start : start + 64]))
        total += count_unique(torch.log_softmax(chunk / temperature, dim=-1)).sum().item()
    return total / len(logprobs_PV)


def find_temperature(logprobs_PV: NDArray[np.float32]) -> float:
    """Return the temperature at which a position has UNIQUE_TARGET different ids on average.

    Bisection on every 16th position; then again, with what all positions have more or less than those.
    """
    sample = np.array(logprobs_PV[::16])
    target, temperature = UNIQUE_TARGET, math.nan
    for attempt in range(2):
        low, high = 0.4, 2.0
        for _ in range(11):
            temperature = (low + high) / 2
            found = compute_mean_unique(sample, temperature)
            low, high = (temperature, high) if found < target else (low, temperature)
        if attempt == 0:
            target += found - compute_mean_unique(logprobs_PV, temperature)
    return temperature


def measure(logprobs_PV: NDArray[np.float32], next_tokens_P: NDArray[np.int32]) -> dict[str, Any]:
    """Return entropy (nats), unique ids, top-k masses, sum of squares and the held-out loss of distributions."""
    entropies, uniques, squares, masses, losses = [], [], [], [], []
    for start in range(0, len(logprobs_PV), 256):
        chunk = torch.from_numpy(logprobs_PV[start : start + 256])
        probs = chunk.exp()
        entropies.append(-(probs * chunk).sum(dim=-1))
        squares.append(probs.square().sum(dim=-1))
        uniques.append(count_unique(chunk))
        top = probs.topk(256, dim=-1).values.cumsum(dim=-1)
        masses.append(top[:, [0, 11, 49, 63, 127, 255]])
        next_tokens = torch.from_numpy(next_tokens_P[start : start + 256]).long()
        losses.append(-chunk.gather(-1, next_tokens[:, None])[:, 0])
    entropy = torch.cat(entropies)
    mass = torch.cat(masses).mean(dim=0)
    return {
        "entropy": round(entropy.mean().item(), 4),
        "entropy_quantiles_10_50_90": [
            round(q, 3) for q in np.quantile(entropy.numpy(), [0.1, 0.5, 0.9]).tolist()
        ],
        "unique_ids_in_50": round(torch.cat(uniques).mean().item(), 3),
        "sum_of_squares": round(torch.cat(squares).mean().item(), 5),
        "mass_of_top": {
            str(k): round(m, 4)
            for k, m in zip((1, 12, 50, 64, 128, 256), mass.tolist(), strict=True)
        },
        "held_out_loss": round(torch.cat(losses).mean().item(), 4),
    }


def write_distributions(
    path: Path,
    sequences: NDArray[np.int32],
    model: TinyGPT,
    indexes: list[NextTokens],
    unigram_V: NDArray[np.float64],
    mixture: Mixture,
) -> float:
    """Write logprobs [P, V] float32 to `path`, at the temperature that calibrates them; return it."""
    length = sequences.shape[1] - 1
    shape = (len(sequences) * length, len(unigram_V))
    logprobs_PV = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for s, sequence in enumerate(sequences):
        probs_TV = mix(
            mixture,
            model.compute_probs(sequence[:-1]),
            unigram_V,
            look_up_all(indexes, sequence[:-1]),
        )
        logprobs_PV[s * length : (s + 1) * length] = np.log(probs_TV)
        if (s + 1) % 8 == 0:
            say(f"distributions: sequence {s + 1}/{len(sequences)}")
    temperature = find_temperature(logprobs_PV)
    for start in range(0, len(logprobs_PV), 256):
        chunk = torch.from_numpy(logprobs_PV[start : start + 256])
        chunk.copy_(torch.log_softmax(chunk.double() / temperature, dim=-1))
    logprobs_PV.flush()
    return temperature


def say(line: str) -> None:
    """Print a progress line with the processor seconds so far."""
    print(f"[{time.process_time():6.0f} s CPU] {line}", flush=True)


@dataclasses.dataclass(frozen=True)
class Text:
    """The text as tokens."""

    tokenizer: Tokenizer
    stream: NDArray[np.int32]  # all training documents, one after the other
    sequences: NDArray[np.int32]  # [num_sequences, T + 1], held out
    fit_sequences: NDArray[np.int32]  # [num_fit_sequences, T + 1], held out too
    described: dict[str, Any]


def prepare_text(settings: Settings) -> Text:
    """Read, split, learn the tokens and tokenize."""
    documents = read_documents(settings)
    training, held_out = split_documents(documents, settings)
    megabytes = sum(len(d.encode()) for d in documents) / 1e6
    say(f"text: {megabytes:.1f} MB, {len(documents):,} documents, {len(held_out)} of them held out")
    tokenizer = train_tokenizer(training, settings.vocabulary)
    stream = np.concatenate(tokenize(tokenizer, training))
    say(f"tokens: {len(stream):,} of {tokenizer.get_vocab_size():,} kinds to train on")
    count = settings.num_sequences + settings.num_fit_sequences
    sequences = cut_sequences(
        tokenize(tokenizer, held_out), count, settings.sequence_length, settings.seed
    )
    described = {
        "text_mb": round(megabytes, 1),
        "text_digest": xxhash.xxh3_128_hexdigest("\0".join(documents).encode()),
        "training_tokens": len(stream),
    }
    # The last ones are of other documents than the first, where there are enough.
    cut = settings.num_sequences
    return Text(tokenizer, stream, sequences[:cut], sequences[cut:], described)


def build(folder: Path, settings: Settings) -> None:
    """Make the distributions in `folder`."""
    text = prepare_text(settings)
    counts_V = np.bincount(text.stream, minlength=settings.vocabulary).astype(np.int64)
    unigram_V = (counts_V + 0.1) / (counts_V + 0.1).sum()
    model = train_gpt(text.stream, unigram_V, settings)
    indexes = [NextTokens(text.stream, n) for n in (1, 2, 3, 4)]
    evidence = gather_evidence(model, indexes, unigram_V, text.fit_sequences)
    mixture = fit_mixture(evidence)
    losses = {
        "gpt": float(-np.log(evidence.gpt).mean()),
        "mixture": compute_loss(mixture, evidence),
    }
    say(f"mixture: loss {losses['mixture']:.3f}, GPT alone {losses['gpt']:.3f}; {mixture}")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").unlink(missing_ok=True)
    logprobs_path = folder / "logprobs.npy"
    temperature = write_distributions(
        logprobs_path, text.sequences, model, indexes, unigram_V, mixture
    )
    next_tokens = np.ascontiguousarray(text.sequences[:, 1:]).reshape(-1)
    measured = measure(np.load(logprobs_path, mmap_mode="r+"), next_tokens) | {
        "temperature": temperature,
        "fit_losses": losses,
        "mixture": dataclasses.asdict(mixture),
        **text.described,
        "cpu_seconds": round(time.process_time()),
    }
    text.tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "tokens.npy", np.ascontiguousarray(text.sequences[:, :-1]))
    np.save(folder / "next_tokens.npy", next_tokens)
    np.save(folder / "unigram_counts.npy", counts_V)
    described = describe_text(settings) | {"measured": measured}
    (folder / "settings.json").write_text(json.dumps(described, indent=2) + "\n")


def ensure(folder: Path, settings: Settings) -> Distributions:
    """Return the folder's distributions; make them first unless they are there, of these settings and this text."""
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        found.pop("measured")
        if found == describe_text(settings):
            return load(folder)
        say(f"{folder} holds distributions of other settings or other text: they are made again")
    build(folder, settings)
    return load(folder)


def main() -> None:
    """Make the distributions, or find them made, and print what they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=default_folder(), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a crude teacher in about a minute, for a smoke test"
    )
    parser.add_argument(
        "--sequences", type=int, help="held-out sequences (default: 32; 64 MiB each at 32k ids)"
    )
    parser.add_argument("--vocabulary", type=int, help="ids of the tokenizer (default: 32768)")
    parser.add_argument("--steps", type=int, help="training steps of the GPT")
    parser.add_argument(
        "--threads", type=int, default=1, help="processor threads (default: %(default)s)"
    )
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    os.environ["RAYON_NUM_THREADS"] = str(flags.threads)
    changes: dict[str, Any] = dict(QUICK) if flags.quick else {}
    changes |= {"num_sequences": flags.sequences} if flags.sequences else {}
    changes |= {"num_steps": flags.steps} if flags.steps else {}
    changes |= {"vocabulary": flags.vocabulary} if flags.vocabulary else {}
    distributions = ensure(flags.out, Settings(**changes))
    print(json.dumps(distributions.measured, indent=2))
    print(
        f"{flags.out}: logprobs {distributions.logprobs.shape}, tokens {distributions.tokens.shape}"
    )


if __name__ == "__main__":
    main()
