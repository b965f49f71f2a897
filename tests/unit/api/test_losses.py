"""The public losses: those of Retort's own training to rounding; one sentence for what does not belong together."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Gemma2Config, Gemma2ForCausalLM

import retort
from retort.cache.reader import LogitCache
from retort.losses.model_loss import LossTargets
from retort.tokens.tokenizer import load_tokenizer
from retort.training.arguments import training_arguments
from retort.training.loop import build_trainer
from support.bench import Bench
from support.tiny import NUM_TOKENS, WIDTH, name_token, swap_tokens

LAYER = torch.zeros(WIDTH, 8)


def collate(cache: retort.CacheDataset, numbers: list[int], **options: Any) -> dict[str, Any]:
    """Return the batch of some sequences."""
    return retort.Collator(cache, **options)([cache[number] for number in numbers])


def read_gradients(model: Any, total: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss, by parameter."""
    model.zero_grad()
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("way", ["hidden", "counted", "logits"])
@pytest.mark.parametrize(
    ("whole", "keys"),
    [
        (False, {"alpha": 0.3}),
        (False, {"alpha": 1.0, "distillation_type": "output"}),
        (
            False,
            {"alpha": 0.0, "distillation_type": "logit", "position_weights": "teacher_entropy"},
        ),
        (True, {"alpha": 0.5, "temperature": 3.0, "divergence": "reverse_kl"}),
    ],
)
def test_losses_and_gradients_are_those_of_retorts_training(
    bench: Bench, tmp_path: Path, way: str, whole: bool, keys: dict[str, Any]
) -> None:
    source: LogitCache = bench.full if whole else bench.cache
    job = bench.job(source, batch_size=4, device="cpu", **{"temperature": 1.0} | keys)
    trainer = build_trainer(training_arguments(tmp_path, job), job)
    model = trainer.model
    theirs = next(iter(trainer.get_train_dataloader()))
    numbers = theirs["sequences"].tolist()
    targets = LossTargets(
        theirs["labels"], theirs["counted"], theirs.get("teacher"), len(theirs["counted"])
    )
    read = {
        n: theirs[n]
        for n in ("input_ids", "attention_mask", "position_ids", "bounds")
        if n in theirs
    }
    expected = model(**read, targets=targets)
    gradients = read_gradients(model, expected.total)

    batch = collate(retort.open_cache(source.path), numbers)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    settings = {k: v for k, v in keys.items() if k != "distillation_type"}
    if way == "logits":
        found = retort.distillation_loss_of_logits(
            model(**inputs).logits, batch["targets"], **settings
        )
    else:
        hidden = model.base_model(**inputs).last_hidden_state
        if way == "counted":
            hidden = hidden.flatten(0, 1)[batch["targets"].counted]
        found = retort.distillation_loss(hidden, model, batch["targets"], **settings)
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or math.isclose(mine.item(), other.item(), abs_tol=1e-6)
    for name, gradient in read_gradients(model, found.total).items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-5)


def test_items_hold_what_the_token_files_hold(bench: Bench) -> None:
    cache = retort.open_cache(bench.cache.path)
    assert len(cache) == len(bench.table) and cache.num_positions == bench.table.num_positions
    for number in (0, 5, -1):
        item, row = cache[number], bench.table[number % len(cache)]
        assert item["index"] == number % len(cache)
        assert item["input_ids"].tolist() == row.ids.tolist()
        assert item["loss_mask"].tolist() == row.loss_mask.tolist()
        assert item["labels"][1:][item["loss_mask"][:-1]].tolist() == row.next_ids.tolist()
        assert len(item["targets"]) == row.num_positions
        assert item["document"] == bench.table.documents[number]
        assert item["segment_starts"].tolist() == [0] and item["category"] == item["source"] == ""
    with pytest.raises(IndexError, match="no sequence"):
        cache[len(cache)]
    assert [item["index"] for item in cache] == list(range(len(cache)))  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(cache))[3]["document"] == cache[3]["document"]


def test_workers_make_the_same_batches(bench: Bench) -> None:
    cache = retort.open_cache(bench.cache.path)
    loaders = [
        DataLoader(cache, batch_size=16, collate_fn=retort.Collator(cache), num_workers=n)
        for n in (0, 2)
    ]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["targets"].rows.logprobs, other["targets"].rows.logprobs)
        assert torch.equal(one["targets"].labels, one["labels"][one["labels"] != -100])


def test_parts_of_a_step_add_up_to_the_step(bench: Bench) -> None:
    cache = retort.open_cache(bench.cache.path)
    torch.manual_seed(0)
    logits = torch.randn(6, max(len(cache[i]["input_ids"]) for i in range(6)), WIDTH)
    whole = collate(cache, list(range(6)))
    expected = retort.distillation_loss_of_logits(logits, whole["targets"]).total
    total = torch.zeros(())
    for numbers in ([0, 1, 2, 3], [4, 5]):
        part = collate(cache, numbers)
        own = logits[numbers][:, : part["input_ids"].shape[1]]
        total += retort.distillation_loss_of_logits(
            own, part["targets"], num_items_in_batch=len(whole["targets"])
        ).total
    torch.testing.assert_close(total, expected)


def test_a_head_with_a_cap_is_told_by_its_model(bench: Bench) -> None:
    cache = retort.open_cache(bench.cache.path)
    batch = collate(cache, [0, 1, 2])
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(
        vocab_size=WIDTH,
        final_logit_softcapping=0.2,
        pad_token_id=0,
        initializer_range=0.5,
        **shape,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden = model.base_model(**inputs).last_hidden_state
    targets = batch["targets"]
    expected = retort.distillation_loss_of_logits(model(**inputs).logits, targets).total
    torch.testing.assert_close(retort.distillation_loss(hidden, model, targets).total, expected)
    capless = retort.distillation_loss(hidden, model.get_output_embeddings(), targets).total
    assert abs(capless.item() - expected.item()) > 1e-3


def test_a_narrower_student_of_the_same_tokenizer_loses_nothing(bench: Bench) -> None:
    cache = retort.open_cache(bench.full.path)
    torch.manual_seed(0)
    batch, cut = collate(cache, [0, 1]), collate(cache, [0, 1], vocabulary=NUM_TOKENS)
    logits = torch.randn(*batch["input_ids"].shape, WIDTH)
    logits[..., NUM_TOKENS:] = -1e4
    expected = retort.distillation_loss_of_logits(logits, batch["targets"])
    found = retort.distillation_loss_of_logits(logits[..., :NUM_TOKENS], cut["targets"])
    torch.testing.assert_close(found.total, expected.total)
    with pytest.raises(ValueError, match=r"give Collator\(cache, vocabulary=300\)"):
        retort.distillation_loss_of_logits(logits[..., :NUM_TOKENS], batch["targets"])
    with pytest.raises(ValueError, match=r"has only 100 ids: they have different tokenizers"):
        collate(cache, [0, 1], vocabulary=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 7.0}, r"^temperature is 7.0, but .* holds the tail's mass at \(1.0"),
        ({"divergence": "kl"}, "divergence is 'kl': give one of forward_kl, reverse_kl"),
        ({"position_weights": "x"}, "position_weights is 'x': give one of teacher_entropy, .*None"),
    ],
)
def test_wrong_settings_are_refused(bench: Bench, settings: dict[str, Any], message: str) -> None:
    batch = collate(retort.open_cache(bench.cache.path), [0])
    logits = torch.zeros(*batch["input_ids"].shape, WIDTH)
    with pytest.raises(ValueError, match=message):
        retort.distillation_loss_of_logits(logits, batch["targets"], **settings)


def test_what_is_not_of_the_batch_is_refused(bench: Bench) -> None:
    cache = retort.open_cache(bench.cache.path)
    targets = collate(cache, [0, 1])["targets"]
    with pytest.raises(ValueError, match=r"hidden is of shape \[2, 3, 8\], but the batch has"):
        retort.distillation_loss(torch.zeros(2, 3, 8), LAYER, targets)
    with pytest.raises(ValueError, match="head is a ReLU, which has no weight"):
        retort.distillation_loss(torch.zeros(2, 3, 8), torch.nn.ReLU(), targets)
    items = [{"input_ids": cache[0]["input_ids"], "labels": cache[0]["labels"]}]
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        retort.Collator(cache)(items)


def test_what_is_not_a_cache_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a logit cache"):
        retort.open_cache(tmp_path)
    (tmp_path / "teacher_logits.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a finished cache"):
        retort.open_cache(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read as HDF5"):
        retort.open_cache(tmp_path / "teacher_logits.h5")


def test_another_tokenizer_is_refused_in_one_sentence(bench: Bench, tmp_path: Path) -> None:
    path, teacher = bench.cache.path, bench.teacher_path
    for same in (teacher, str(teacher), load_tokenizer(str(teacher))):
        assert len(retort.open_cache(path, tokenizer=same)) == len(bench.table)
    swapped = swap_tokens(tmp_path / "swapped", teacher)
    with pytest.raises(ValueError, match=r"is not the one that .* was made with"):
        retort.open_cache(path, tokenizer=swapped)
    # With the config beside it, as the workflow leaves it, tokens are compared one by one.
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "teacher_logits.h5").symlink_to(path)
    config = f'{{"config": {{"teacher": {{"model_path": "{teacher}"}}}}}}'
    (folder / "config.json").write_text(config)
    beside = folder / "teacher_logits.h5"
    with pytest.raises(ValueError, match="give different ids: 'a', id"):
        retort.open_cache(beside, tokenizer=swapped)
    more = name_token(tmp_path / "more", teacher, "<more>")
    assert len(retort.open_cache(beside, tokenizer=more)) == len(bench.table)
