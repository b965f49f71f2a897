"""The loss inside real students of every kind of head: the gradients of autograd over all their own logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from retort.losses.model_loss import LossTargets, attach_loss
from retort.losses.teacher_rows import TeacherRows
from retort.losses.terms import LossSettings, compute_dense_divergence
from retort.models.causal_lm import needs_mask, split_model
from retort.models.heads import Head
from retort.training.batches import IGNORE_INDEX, find_counted
from support.syncs import CountSyncs

torch.set_num_threads(1)

VOCABULARY = 40
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
STUDENTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, **SMALL},
    "gpt2, tied": {"model_type": "gpt2", **GPT2},
    "gemma2: softcap, scaled embedding": {
        "model_type": "gemma2",
        "final_logit_softcapping": 3.0,
        **SMALL,
    },
    "cohere: scale": {"model_type": "cohere", "logit_scale": 0.25, **SMALL},
    "granite: scaling": {"model_type": "granite", "logits_scaling": 4.0, **SMALL},
    "phi: bias": {"model_type": "phi", **SMALL},
    "opt: tied, narrower than its body": {
        "model_type": "opt",
        "hidden_size": 8,
        "word_embed_proj_dim": 4,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "dropout": 0.0,
        "do_layer_norm_before": False,
    },
}


def build(name: str) -> PreTrainedModel:
    """A small student in float64 with fixed random weights; id 0 is padding."""
    keys = {k: v for k, v in STUDENTS[name].items() if k != "model_type"}
    config = AutoConfig.for_model(
        STUDENTS[name]["model_type"], vocab_size=VOCABULARY, pad_token_id=0, **keys
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def make_batch() -> tuple[dict[str, Tensor], Tensor]:
    """Three rows of different lengths, one with the padding's id within, and labels with gaps."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 9))
    ids[0, 3], ids[1, 6:], ids[2, 8:] = 0, 0, 0
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 8:] = 0, 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, 0] = labels[0, 4] = labels[2, 1] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask}, labels


def aim(labels: Tensor, teacher: TeacherRows | None, normalizer: float) -> LossTargets:
    return LossTargets(labels, find_counted(labels), teacher, normalizer)


def make_teacher(rows: int) -> tuple[TeacherRows, Tensor]:
    """Whole distributions, as rows without a tail and as logprobs [P, V]."""
    torch.manual_seed(2)
    logprobs = torch.randn(rows, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    return (
        TeacherRows(
            torch.arange(rows + 1) * VOCABULARY,
            torch.arange(VOCABULARY).repeat(rows),
            logprobs.flatten(),
            torch.full((rows,), -1e4, dtype=torch.float64),
        ),
        logprobs,
    )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=1e-5, atol=5e-6
        )  # the teacher is float32


def learn_from_all_logits(model: PreTrainedModel, temperature: float) -> dict[str, Tensor]:
    """The gradients of the same loss by autograd, from the model's own logits."""
    inputs, labels = make_batch()
    counts = labels[:, 1:] != IGNORE_INDEX
    logits = model(**inputs, use_cache=False).logits[:, :-1][counts]
    hard = F.cross_entropy(logits, labels[:, 1:][counts], reduction="sum")
    _, logprobs = make_teacher(len(logits))
    p, q = (x.div(temperature).log_softmax(-1) for x in (logprobs, logits))
    kl = (p.exp() * (p - q)).sum()
    (0.25 * hard / 7 + 0.75 * temperature**2 * kl / 7).backward()
    return gradients(model)


def learn(
    model: PreTrainedModel, *, passes: int = 1, inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The gradients of the loss inside the model."""
    batch, labels = make_batch()
    inputs = inputs or batch
    teacher, _ = make_teacher(int((labels[:, 1:] != IGNORE_INDEX).sum()))
    for _ in range(passes):
        model(**inputs, targets=aim(labels, teacher, 7)).total.backward()
    return gradients(model)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_gets_the_gradients_of_all_its_logits(name: str, temperature: float) -> None:
    model = build(name)
    expected = learn_from_all_logits(model, temperature)
    split = split_model(model)
    assert split.is_split
    attach_loss(split, LossSettings(0.25, temperature, chunk_size=4))
    assert_same(learn(model), expected)


def test_a_student_whose_head_is_of_an_unknown_form_learns_the_same_from_all_its_logits() -> None:
    model = build("gemma2: softcap, scaled embedding")
    expected = learn_from_all_logits(model, 2.0)
    split = replace(split_model(model), head=Head(weight=None), is_split=False)
    attach_loss(split, LossSettings(0.25, 2.0))
    assert_same(learn(model), expected)


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_gradients_of_several_passes_add_up_and_other_calls_are_as_before(name: str) -> None:
    model = build(name)
    inputs, labels = make_batch()
    logits = model(**inputs).logits
    attach_loss(split_model(model), LossSettings(1.0, chunk_size=4))
    once = learn(model)
    assert_same(learn(model, passes=2), {n: 2 * g for n, g in once.items()})
    assert torch.equal(model(**inputs).logits, logits)
    with torch.no_grad():
        terms = model(**inputs, targets=aim(labels, None, 7))
    assert not terms.total.requires_grad
    assert_same(learn(model), once)  # a pass without gradients leaves no state
    model(**inputs, targets=aim(labels, None, 7))  # nor does one without its backward pass
    assert_same(learn(model), once)


def test_a_frozen_tied_weight_stays_frozen() -> None:
    model = build("llama, tied")
    attach_loss(split_model(model), LossSettings(1.0))
    model.get_input_embeddings().weight.requires_grad_(False)
    found = learn(model)
    assert "model.embed_tokens.weight" not in found and found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama, tied", "gemma2: softcap, scaled embedding"])
def test_a_compiled_student_learns_the_same(name: str) -> None:
    model = build(name)
    attach_loss(split_model(model), LossSettings(0.25, 2.0, chunk_size=4))
    expected = learn(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    inputs, labels = make_batch()
    teacher, _ = make_teacher(int((labels[:, 1:] != IGNORE_INDEX).sum()))
    compiled(**inputs, targets=aim(labels, teacher, 7)).total.backward()
    assert_same(gradients(model), expected)


def test_recomputed_activations_change_nothing() -> None:
    model = build("llama, tied")
    attach_loss(split_model(model), LossSettings(0.25, 2.0))
    expected = learn(model)
    model.gradient_checkpointing_enable()
    assert_same(learn(model), expected)


def test_a_batch_without_any_label_teaches_nothing() -> None:
    model = build("llama, tied")
    attach_loss(split_model(model), LossSettings(1.0))
    inputs, labels = make_batch()
    terms = model(**inputs, targets=aim(torch.full_like(labels, IGNORE_INDEX), None, 7))
    terms.total.backward()
    assert float(terms.total.detach()) == 0.0
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()  # DDP waits for all of them
    assert all(float(g.abs().max()) == 0.0 for g in found.values())


@pytest.mark.parametrize(
    ("divergence", "beta"), [("forward_kl", 0.0), ("jensen_shannon", 0.5), ("reverse_kl", 1.0)]
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_those_of_trl(
    divergence: str, beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's generalised Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649), which has no factor T^2."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    model = build("llama")
    inputs, labels = make_batch()
    counts = labels[:, 1:] != IGNORE_INDEX
    logits = model(**inputs, use_cache=False).logits[:, :-1][counts]
    teacher, logprobs = make_teacher(len(logits))
    loss: Any = GKDTrainer.generalized_jsd_loss
    theirs = loss(logits[None], logprobs[None], beta=beta, temperature=temperature, reduction="sum")
    theirs.backward()
    expected = gradients(model)
    attach_loss(split_model(model), LossSettings(0.0, temperature, divergence, chunk_size=4))
    terms = model(**inputs, targets=aim(labels, teacher, 1.0))
    terms.total.backward()
    assert float(terms.soft) == pytest.approx(temperature**2 * float(theirs.detach()), rel=1e-6)
    assert_same(gradients(model), {n: temperature**2 * g for n, g in expected.items()})
    live = compute_dense_divergence(
        logits.detach(), logprobs, temperature=temperature, divergence=divergence
    )
    assert float(live) == pytest.approx(float(theirs.detach()), rel=1e-5)


@pytest.mark.parametrize(("name", "in_backward"), [("llama", 0), ("llama, tied", 1)])
def test_a_step_does_not_wait_for_a_gpu_in_the_loss(name: str, in_backward: int) -> None:
    """A forward waits once, in transformers; the backward pass of a tied weight at its end, for the distinct ids."""
    model, (inputs, labels) = build(name), make_batch()
    split = split_model(model)
    attach_loss(split, LossSettings(0.25, 2.0, chunk_size=4))
    targets = aim(labels, make_teacher(int((labels != IGNORE_INDEX).sum()))[0], 7)
    assert not needs_mask(split)
    with CountSyncs() as syncs:
        terms = model(input_ids=inputs["input_ids"], targets=targets)
    assert syncs.found.total() == 1, syncs.found
    with CountSyncs() as syncs:
        terms.total.backward()
    assert syncs.found.total() == in_backward, syncs.found


def test_gradients_are_the_same_without_a_mask() -> None:
    model, (inputs, _) = build("llama"), make_batch()
    attach_loss(split_model(model), LossSettings(0.25, 2.0, chunk_size=4))
    expected = learn(model)
    del inputs["attention_mask"]
    assert_same(learn(model, inputs=inputs), expected)
