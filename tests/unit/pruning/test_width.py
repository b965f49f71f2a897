"""Fewer channels, neurons, heads and ids: the least active go, and what is zero goes without a trace."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retort.config.sections import Student
from retort.pruning.cut import keep_layers, narrow, require_prunable
from retort.pruning.importance import measure_importance
from retort.pruning.layers import find_layers
from retort.pruning.shapes import plan_pruning
from retort.pruning.width import Importance
from retort.tokens.sequences import SequenceTable, build_table
from support.kinds import SIZES, VOCABULARY, make_model
from support.sections import section

WIDE: dict[str, Any] = SIZES | {"num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 48}
WIDE |= {"num_key_value_heads": 3, "head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"attention_bias": True, "mlp_bias": True},
    "qwen2": WIDE,
    "qwen3": WIDE,
    "mistral": WIDE,
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "smollm3": WIDE,
    "olmo2": WIDE,
    "cohere": WIDE,
    "granite": WIDE,
}
IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def table() -> SequenceTable:
    chance = torch.Generator().manual_seed(1)
    lengths = (12, 7, 20)
    rows = [torch.randint(VOCABULARY, (length,), generator=chance).numpy() for length in lengths]
    return build_table([(ids, [True] * len(ids), 0, ("", "")) for ids in rows])


def make(kind: str, **keys: Any) -> PreTrainedModel:
    """Return a random model whose biases and norms are random too."""
    model = make_model(kind, **(KINDS[kind] | keys)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.rand_like(weight) if weight.dim() == 1 else 0)
    return model


def prune(whole: PreTrainedModel, table: SequenceTable, **part: Any) -> PreTrainedModel:
    student = Student(from_teacher=section("student.from_teacher", **part))
    plan = plan_pruning(student, whole.config, name="the model")
    require_prunable(whole.config, plan, name="the model")
    small = keep_layers(whole, plan, name="the model")
    is_measured = student.from_teacher.is_measured
    return narrow(
        small, plan, measure_importance(whole, plan.layers, table) if is_measured else None
    )


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits
    return found


def layers_of(model: PreTrainedModel) -> list[Any]:
    return [*find_layers(model)[1]]


def matrix(layer: torch.nn.Module, name: str) -> Any:
    (found,) = (m for path, m in layer.named_modules() if path.rpartition(".")[2] == name)
    return found


@torch.no_grad()
def empty(layer: torch.nn.Module, name: str, rows: slice) -> None:
    """Set some rows of a matrix, and of its bias, to zero."""
    linear = matrix(layer, name)
    linear.weight[rows] = 0
    if linear.bias is not None:
        linear.bias[rows] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_model_is_the_model(kind: str, table: SequenceTable) -> None:
    whole = make(kind)
    config = whole.config
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    small = prune(whole, table, **{size: getattr(config, size) for size in sizes})
    assert torch.equal(logits(small), logits(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_and_heads_that_are_zero_go_without_a_trace(
    kind: str, table: SequenceTable
) -> None:
    """In each layer others; key heads go with the heads that share them."""
    whole = make(kind)
    for number, layer in enumerate(layers_of(whole)):
        neurons, group = slice(number, number + 8), [1, 0, 2][number]
        empty(layer, "gate_proj", neurons)
        empty(layer, "up_proj", neurons)
        empty(layer, "v_proj", slice(8 * group, 8 * group + 8))
    heads = {} if kind == "olmo2" else {"num_attention_heads": 4}  # its q_norm is of all heads
    small = prune(whole, table, intermediate_size=56, **heads)
    assert small.num_parameters() < whole.num_parameters()
    torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-5)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = small.generate(IDS, use_cache=True, **greedy)
    assert torch.equal(written, small.generate(IDS, use_cache=False, **greedy))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "smollm3"])
def test_a_channel_that_is_zero_goes_and_norms_are_of_the_others(
    kind: str, table: SequenceTable
) -> None:
    """The mean square of fewer channels is D / D' times as large: the whole with such norms is the reference."""
    whole, gone = make(kind, tie_word_embeddings=False), slice(5, 11)
    with torch.no_grad():
        whole.get_input_embeddings().weight[:, gone] = 0
        for layer in layers_of(whole):
            for name in ("o_proj", "down_proj"):
                empty(layer, name, gone)
    small = prune(whole, table, hidden_size=42)
    assert small.config.hidden_size == 42 and small.config.head_dim == 8
    share = 42 / 48
    with torch.no_grad():
        for norm in whole.modules():
            if getattr(norm, "weight", torch.empty(0)).shape == (48,):
                norm.weight.mul_(share**0.5)
                norm.variance_epsilon *= share
    torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_first_ids_are_kept(is_tied: bool, table: SequenceTable) -> None:
    whole = make("llama", tie_word_embeddings=is_tied)
    whole.config.bos_token_id = 1
    ids = IDS % 90
    small = prune(whole, table, vocab_size=90)
    with torch.inference_mode():
        expected = whole(ids, use_cache=False).logits[..., :90]
        found = small(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ends = (small.get_input_embeddings().weight, small.get_output_embeddings().weight)
    assert (ends[0] is ends[1]) == is_tied


def test_layers_are_measured_where_they_were(table: SequenceTable) -> None:
    """The neurons of a kept layer are those that matter in the whole model, not in the few layers that are left."""
    whole = make("llama")
    small = prune(whole, table, layer_indices=(0, 2), intermediate_size=16)
    scores = measure_importance(whole, (0, 1, 2), table).neurons[2]
    kept = scores.argsort(descending=True)[:16].sort().values
    found = layers_of(small)[1].mlp.gate_proj.weight
    assert torch.equal(found, layers_of(whole)[2].mlp.gate_proj.weight[kept])


def test_importance_is_the_mean_of_the_sequences_norms(table: SequenceTable) -> None:
    """Against a layer computed by hand, from its attention's probabilities."""
    whole = make("llama", num_hidden_layers=1)
    whole.set_attn_implementation("eager")
    (layer,) = layers_of(whole)
    base: Any = whole.base_model
    expected: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for number in range(len(table)):
            ids = torch.from_numpy(table[number].ids).long()[None]
            given = base.embed_tokens(ids)[0]
            first = layer.input_layernorm(given)
            weights = whole(ids, output_attentions=True).attentions[0][0]  # [H, T, T]
            values = layer.self_attn.v_proj(first).view(-1, 3, 8).repeat_interleave(2, 1)
            heads = torch.einsum("hts,shd->thd", weights, values)
            given = given + layer.self_attn.o_proj(heads.flatten(1))
            second = layer.post_attention_layernorm(given)
            mlp = layer.mlp
            neurons = torch.nn.functional.silu(mlp.gate_proj(second)) * mlp.up_proj(second)
            last = base.norm(given + mlp.down_proj(neurons))
            hidden = first.norm(dim=0) + second.norm(dim=0) + last.norm(dim=0)
            groups = heads.reshape(len(ids[0]), 3, 16).norm(dim=(0, 2))
            expected.append((hidden, neurons.norm(dim=0), groups))
    hidden, neurons, groups = (torch.stack(parts).mean(0) for parts in zip(*expected, strict=True))
    found = measure_importance(whole, (0,), table)
    for mine, theirs in (
        (found.hidden, hidden),
        (found.neurons[0], neurons),
        (found.groups[0], groups),
    ):
        torch.testing.assert_close(mine.float(), theirs, rtol=1e-4, atol=1e-5)
        assert mine.dtype == torch.float64


def test_of_equal_channels_the_first_are_kept() -> None:
    whole = make("llama")
    part = section("student.from_teacher", hidden_size=6, intermediate_size=2)
    plan = plan_pruning(Student(from_teacher=part), whole.config, name="the model")
    same = Importance(torch.ones(48), [torch.ones(64)] * 3, [torch.ones(3)] * 3)
    small = narrow(keep_layers(whole, plan, name="the model"), plan, same)
    up = layers_of(small)[1].mlp.up_proj.weight
    assert torch.equal(up, layers_of(whole)[1].mlp.up_proj.weight[:2, :6])


OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "phi3": SIZES | {"pad_token_id": 0},
    "qwen3_moe": SIZES | {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_with_other_weights_are_refused(kind: str, table: SequenceTable) -> None:
    keys = {k: v for k, v in OTHERS[kind].items() if k != "pad_token_id"}
    whole = make_model(kind, **keys)
    with pytest.raises(ValueError, match=r"so only its layers can be pruned: .* like Llama"):
        prune(whole, table, hidden_size=16)
    prune(whole, table, layers=1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"hidden_size": 49}, r"hidden_size is 49, but that of the model is 48\. Set 48 or less"),
        (
            {"hidden_size": 40},
            r"hidden_size 40 of .* refuses .*The hidden size \(40\) is not a mult",
        ),
        ({"vocab_size": 98}, r"vocab_size is 98, but that of the model is 97"),
        ({"num_attention_heads": 3}, r"is 3, but .* shared by 2 heads.* Set a multiple of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(part: Any, words: str, table: SequenceTable) -> None:
    with pytest.raises(ValueError, match=words):
        prune(make("llama"), table, **part)


def test_a_model_without_such_sizes_is_refused(table: SequenceTable) -> None:
    whole = make_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="does not have its sizes as one number each"):
        prune(whole, table, intermediate_size=8)
