"""How many tokens the teacher reads at once with `batch_tokens: auto`: found once for a cache, by halving.

Other batches round differently, so all parts of a cache are made with one number. The first worker that has found one
records it beside the parts before it makes any; every other worker, and every later attempt, on whatever device, reads
that record. The number is in the names of the parts, so parts made with another one are never merged with them.
"""

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from retort.cache.codec import Codec
from retort.models.causal_lm import CausalLM
from retort.models.load import describe_device
from retort.teacher.batches import Batch
from retort.teacher.records import BATCH_FILE, BatchTokens
from retort.teacher.scoring import Scorer, free_memory, select_batches
from retort.tokens.sequences import build_table

logger = logging.getLogger(__name__)

# More at once make neither device faster. A CPU reads from its caches.
_MOST = {"cpu": 2048, "cuda": 1 << 16}
_USED_SHARE = 0.8  # of the free memory: what is left is for fragments, and for the batches that are read ahead
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
# Values of one token that live at once in a layer: of the hidden width, of the feed-forward layer's.
_HIDDEN_VALUES, _INNER_VALUES = 10, 4


def agree_on_batch_tokens(folder: Path, find: Callable[[], BatchTokens]) -> int:
    """Return the number that all workers of a cache use: the recorded one, else what `find` finds, which is recorded.

    Of several workers that record at once, the first one wins. Raises ValueError where the file system cannot do that.
    """
    path = folder / BATCH_FILE
    if not path.exists():
        found = find()
        try:
            found.write_once(path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise ValueError(
                f"{path} cannot be recorded ({error.strerror}): its file system has no hard links, by which workers "
                f"agree. Set teacher.generation.batch_tokens: {found.batch_tokens}, which was found here."
            ) from None
    record = BatchTokens.read(path)
    logger.info(
        f"batches of up to {record.batch_tokens:,} tokens, as recorded in {path} ({record.device}: {record.reason})"
    )
    return record.batch_tokens


def find_batch_tokens(
    teacher: CausalLM, codec: Codec, *, longest: int, num_tokens: int
) -> BatchTokens:
    """Return how many tokens the teacher reads at once: an estimate, halved until memory does not run out.

    longest: tokens of the longest sequence, of which one is read in any case; num_tokens: size of the tokenizer.
    """
    free_memory()
    estimate, reason = _estimate(teacher, longest)
    tokens = estimate
    while tokens // 2 >= longest:
        fitting = _count_fitting(
            teacher, codec, tokens // longest, longest=longest, num_tokens=num_tokens
        )
        if fitting == tokens // longest:
            break
        while tokens // longest > fitting:
            tokens //= 2
    if tokens < estimate:
        reason += f"; halved from {estimate:,}, since memory ran out"
    free_memory()
    return BatchTokens(batch_tokens=tokens, device=describe_device(teacher.device), reason=reason)


def _estimate(teacher: CausalLM, longest: int) -> tuple[int, str]:
    """Return a power of two, or `longest` if that is more, and how it was estimated."""
    most = _MOST["cpu" if teacher.device.type == "cpu" else "cuda"]
    if teacher.device.type == "cpu":
        tokens, reason = most, "a CPU is not faster with more tokens"
    else:
        free = min(torch.cuda.mem_get_info(device)[0] for device in teacher.devices)
        tokens = int(_USED_SHARE * free) // _count_bytes(teacher)
        reason = f"{free / 1e9:.1f} GB were free on the fullest GPU"
        tokens = min(1 << max(0, tokens.bit_length() - 1), most)
    return max(tokens, longest), reason


def _count_bytes(teacher: CausalLM) -> int:
    """Return the bytes that a token takes in a forward pass, roughly: what the widest layer keeps at once."""
    config = teacher.model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    width = 0 if teacher.is_split else 2 * teacher.vocabulary  # such a model returns its logits
    values = _HIDDEN_VALUES * hidden + _INNER_VALUES * inner + width
    return values * int(teacher.model.dtype.itemsize)


def _count_fitting(
    teacher: CausalLM, codec: Codec, num_sequences: int, *, longest: int, num_tokens: int
) -> int:
    """Return how many sequences are read at once where a batch of `num_sequences` is halved while memory runs out.

    As many batches are read and selected from as are read ahead, and one more.
    """
    ids = (np.arange(longest) % num_tokens).tolist()
    mask = [True] * (longest - 1) + [False]
    table = build_table([(ids, mask, number, ("", "")) for number in range(num_sequences)])
    batches = [Batch(table, np.arange(num_sequences))]
    batches *= teacher.num_gpus + 2 if teacher.num_gpus else 1
    scorer = Scorer(teacher, 1)
    for piece, _, is_halved in select_batches(scorer, batches, codec, num_tokens=num_tokens):
        if is_halved:  # the forward's batch, or the head's rows
            return min(len(piece.indices), num_sequences // 2)
    return num_sequences
