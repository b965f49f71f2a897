"""LoRA: the losses and gradients of the merged weights, adapters that resume, a final model that needs no peft."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from retort.io.files import read_json
from retort.models.students import build_student
from retort.training.arguments import training_arguments
from retort.training.batches import Row
from retort.training.checkpoints import CheckpointRecord
from retort.training.loop import build_trainer
from retort.training.trainer import DistillationTrainer
from support.bench import Bench, assert_same_curve, assert_same_weights, read_log, read_weights
from support.sections import section
from support.tiny import WIDTH

peft = pytest.importorskip("peft")

RANK, ALPHA = 4, 8
LORA: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
KEYS: dict[str, Any] = {"lora": LORA, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module", params=["untied", "tied"])
def pretrained(
    request: pytest.FixtureRequest, bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Weights to start from: the tiny student with larger ones, so that every layer matters."""
    folder = tmp_path_factory.mktemp(request.param)
    content = json.loads(bench.student_path.read_text())
    config = folder / "config_to_build.json"
    config.write_text(json.dumps(content | {"tie_word_embeddings": request.param == "tied"}))
    tokenizer = bench.job(bench.table).tokenizer
    student = section("student", config=str(config))
    model = build_student(student, vocabulary=WIDTH, tokenizer=tokenizer, seed=5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def start(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights to start from."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = bench.job(bench.table).tokenizer
    student = section("student", config=str(bench.student_path))
    build_student(student, vocabulary=WIDTH, tokenizer=tokenizer, seed=5).save_pretrained(folder)
    return folder


def make_trainer(
    bench: Bench, folder: Path, source: Any, student: Path, **keys: Any
) -> DistillationTrainer:
    options: dict[str, Any] = {"device": "cpu", "temperature": 1.0, "dataloader_num_workers": 0}
    options |= keys
    job = bench.job(source, student=student, **options)
    return build_trainer(training_arguments(folder, job), job)


def learn(trainer: DistillationTrainer, rows: list[Row]) -> tuple[dict[str, float], Any]:
    """Return the losses and, by name, the gradients of a batch."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=len(batch["counted"]))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer.window.take(), gradients


def fill_adapters(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Give the adapters other values than their first, with which B is 0; return A and B by module."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
                module, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
                found.setdefault(module.removeprefix("base_model.model."), {})[kind] = weight
    return {module: (pair["A"].detach(), pair["B"].detach()) for module, pair in found.items()}


def merge_by_hand(folder: Path, student: Path, adapters: dict[str, tuple[Tensor, Tensor]]) -> Path:
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        for module, (a, b) in adapters.items():
            model.get_submodule(module).weight += ALPHA / RANK * b @ a
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("learns", ["text", "cache", "full", "live", "packed"])
def test_losses_and_gradients_are_those_of_the_merged_weights(
    learns: str, bench: Bench, pretrained: Path, tmp_path: Path
) -> None:
    """By the chain rule: with W + s B A in place of W, dB = s dW A^T and dA = s B^T dW."""
    source = {"text": bench.table, "full": bench.full, "live": bench.table}.get(learns, bench.cache)
    keys: dict[str, Any] = {"distillation_type": "output"} if learns == "text" else {"alpha": 0.3}
    if learns == "live":
        from retort.models.load import load_teacher

        teacher = load_teacher(str(bench.teacher_path), section("teacher", device="cpu"))
        keys["teacher"] = teacher
    if learns == "packed":
        keys["packing"] = True
    trainer = make_trainer(bench, tmp_path / "lora", source, pretrained, lora=LORA, **keys)
    adapters = fill_adapters(trainer.model)
    assert len(adapters) == 7
    merged = merge_by_hand(tmp_path / "merged", pretrained, adapters)
    plain = make_trainer(bench, tmp_path / "plain", source, merged, **keys)
    rows = sorted(trainer.order.list_rows(0), key=len)[-3:]
    losses, gradients = learn(trainer, rows)
    expected, of_weights = learn(plain, rows)
    assert losses == pytest.approx(
        expected | {"tokens_per_second": losses["tokens_per_second"]}, rel=1e-5
    )
    assert len(gradients) == 14
    scale = ALPHA / RANK
    for module, (a, b) in adapters.items():
        of_weight = of_weights[f"{module}.weight"]
        for kind, gradient in (("A", b.t() @ of_weight), ("B", of_weight @ a.t())):
            found = gradients[f"base_model.model.{module}.lora_{kind}.default.weight"]
            assert float(found.abs().max()) > 1e-3
            torch.testing.assert_close(found, scale * gradient, rtol=1e-4, atol=1e-5)


def test_the_loss_is_transformers_own_in_float64(
    bench: Bench, pretrained: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"distillation_type": "output", "lora": LORA}
    trainer = make_trainer(bench, tmp_path / "lora", bench.table, pretrained, **keys)
    merged = merge_by_hand(tmp_path / "merged", pretrained, fill_adapters(trainer.model))
    (row,) = next(iter(trainer.order.list_rows(0)))
    losses, _ = learn(trainer, [(row,)])
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float64).eval()
    ids = torch.tensor([int(i) for i in bench.table[row].ids])[None]
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    assert bench.table[row].loss_mask[:-1].all()
    assert losses["hard_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_writes_adapters_and_a_model_that_needs_no_peft(
    bench: Bench, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = bench.train(run, bench.cache, student=pretrained, save_steps=2, **KEYS)
    plain = AutoModelForCausalLM.from_pretrained(pretrained)
    assert summary.student_parameters == plain.num_parameters()
    assert summary.trained_parameters == RANK * (4 * (8 + 8) + 3 * (8 + 16))
    final = AutoModelForCausalLM.from_pretrained(run / "final")
    assert type(final) is type(plain) and not hasattr(final, "peft_config")
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    adapted = peft.PeftModel.from_pretrained(base, run / "final/adapter").merge_and_unload()
    changed = 0
    for (name, found), merged in zip(final.named_parameters(), adapted.parameters(), strict=True):
        assert torch.equal(found, merged), name
        is_same = torch.equal(found, plain.get_parameter(name))
        assert is_same == ("_proj" not in name), name
        changed += not is_same
    assert changed == 7
    names = {path.name for path in (run / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    state = torch.load(run / "checkpoint-2/optimizer.pt", weights_only=True)["state"]
    assert len(state) == 14
    assert "rank: 4" in (run / "final/README.md").read_text()
    losses = [float(row["total_loss"]) for row in read_log(run)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "more", [{}, {"optim": "muon"}, {"packing": True, "use_gradient_checkpointing": True}]
)
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    more: dict[str, Any], bench: Bench, start: Path, tmp_path: Path
) -> None:
    keys = KEYS | {"save_steps": 2, "lora": LORA | {"dropout": 0.3}} | more
    whole, resumed, ended = (tmp_path / name for name in ("whole", "resumed", "ended"))
    bench.train(whole, bench.cache, student=start, **keys)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    bench.train(resumed, bench.cache, student=start, **keys)
    shutil.copytree(whole / "checkpoint-4", ended / "checkpoint-4")
    bench.train(ended, bench.cache, student=start, **keys)  # killed before final/ was written
    for folder in (resumed, ended):
        assert_same_weights(folder, whole)
        adapters = "final/adapter/adapter_model.safetensors"
        assert (folder / adapters).read_bytes() == (whole / adapters).read_bytes()
    assert_same_curve(resumed, whole)


def test_the_best_adapters_are_the_student(bench: Bench, start: Path, tmp_path: Path) -> None:
    keys = KEYS | {"learning_rate": 1.0, "max_steps": 2, "save_steps": 1, "eval_steps": 1}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    held_out = bench.hold_out(None, eval_steps=1)
    summary = bench.train(tmp_path, bench.cache, student=start, held_out=held_out, **keys)
    losses = {int(row["step"]): float(row["eval_loss"]) for row in read_log(tmp_path)}
    assert losses[1] < losses[2] - 0.005 and summary.best_step == 1
    kept = tmp_path / "checkpoint-1/adapter_model.safetensors"
    found = load_file(tmp_path / "final/adapter/adapter_model.safetensors")
    for name, weight in load_file(kept).items():
        assert torch.equal(found[name], weight), name


def test_gradient_checkpointing_changes_no_weight(
    bench: Bench, start: Path, tmp_path: Path
) -> None:
    for name, recomputes in (("plain", False), ("recomputed", True)):
        keys = KEYS | {"use_gradient_checkpointing": recomputes}
        bench.train(tmp_path / name, bench.cache, student=start, **keys)
    found, expected = read_weights(tmp_path / "recomputed"), read_weights(tmp_path / "plain")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_seed_gives_the_adapters(bench: Bench, start: Path, tmp_path: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        keys: dict[str, Any] = {"distillation_type": "output", "lora": LORA, "seed": seed}
        model = make_trainer(bench, tmp_path, bench.table, start, **keys).model
        weights.append([w for n, w in model.named_parameters() if "lora_A" in n])
    first, again, other = weights
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_named_modules_alone_get_adapters(bench: Bench, start: Path, tmp_path: Path) -> None:
    lora = LORA | {"target_modules": ["q_proj", "mlp.up_proj"]}
    keys: dict[str, Any] = {"distillation_type": "output", "lora": lora}
    model = make_trainer(bench, tmp_path, bench.table, start, **keys).model
    found = {name for name, w in model.named_parameters() if w.requires_grad}
    assert len(found) == 4 and all("q_proj" in name or "up_proj" in name for name in found)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["q_proj", "query"],
            "has 'query', which is no module of the student .* such as down_proj",
        ),
        (["lm_head"], "has 'lm_head', the embedding or output layer"),
        (["embed_tokens"], "has 'embed_tokens', the embedding or output layer"),
        (
            ["norm"],
            "has 'norm', which is a LlamaRMSNorm of the student .*, not a linear layer.* down_proj",
        ),
    ],
)
def test_targets_that_get_no_adapters_are_refused(
    targets: list[str], said: str, bench: Bench, start: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"lora": LORA | {"target_modules": targets}}
    with pytest.raises(ValueError, match=said):
        make_trainer(bench, tmp_path, bench.cache, start, **keys)


def test_a_checkpoint_of_other_adapters_is_refused(
    bench: Bench, start: Path, tmp_path: Path
) -> None:
    bench.train(tmp_path / "one", bench.cache, student=start, save_steps=2, **KEYS)
    named = str(tmp_path / "one/checkpoint-2")
    for lora in (LORA | {"rank": 2}, {}):
        keys = KEYS | {"max_steps": 6, "lora": lora, "resume_from_checkpoint": named}
        with pytest.raises(ValueError, match=r"goes on with lora rank 4, .* but training.lora is"):
            bench.train(tmp_path / "other", bench.cache, student=start, **keys)
    keys = KEYS | {"max_steps": 6, "resume_from_checkpoint": named}
    bench.train(tmp_path / "more", bench.cache, student=start, **keys)
    bench.train(tmp_path / "whole", bench.cache, student=start, **(KEYS | {"max_steps": 6}))
    assert_same_weights(tmp_path / "more", tmp_path / "whole")


def test_an_adapter_is_no_student_to_start_from(bench: Bench, start: Path, tmp_path: Path) -> None:
    bench.train(tmp_path / "one", bench.cache, student=start, save_steps=2, **KEYS)
    checkpoint = tmp_path / "one/checkpoint-2"
    settings = CheckpointRecord.read(checkpoint / "complete.json").settings
    assert settings["lora"] == "rank 4, alpha 8, dropout 0, of all-linear"
    with pytest.raises(ValueError, match="holds an adapter of LoRA alone; give the merged model"):
        make_trainer(bench, tmp_path, bench.cache, checkpoint)


def count_bytes(trainer: DistillationTrainer, rows: list[Row]) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer after a step."""
    trainer.create_optimizer()
    learn(trainer, rows)
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    weights = list(trainer.model.parameters())
    state = [v for s in trainer.optimizer.state.values() for v in s.values()]
    sizes = {"weights": weights, "gradients": [w.grad for w in weights if w.grad is not None]}
    return {
        name: sum(t.numel() * t.element_size() for t in tensors)
        for name, tensors in (sizes | {"optimizer": state}).items()
    }


def test_weights_gradients_and_optimizer_take_less_than_half(bench: Bench, tmp_path: Path) -> None:
    """The peak of a whole process is measured by benchmarks/training/lora.py."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
    config = tmp_path / "wide.json"
    config.write_text(json.dumps(read_json(bench.student_path) | shape))
    tokenizer = bench.job(bench.table).tokenizer
    student = section("student", config=str(config))
    build_student(student, vocabulary=WIDTH, tokenizer=tokenizer, seed=0).save_pretrained(
        tmp_path / "wide"
    )
    found = {}
    for name, lora in (("full", {}), ("lora", LORA)):
        keys: dict[str, Any] = {"lora": lora, "distillation_type": "output"}
        trainer = make_trainer(bench, tmp_path, bench.table, tmp_path / "wide", **keys)
        found[name] = count_bytes(trainer, [(0,), (1,)])
    full, lora = found["full"], found["lora"]
    assert full["gradients"] == full["weights"] and full["optimizer"] >= 2 * full["weights"]
    assert lora["gradients"] < 0.2 * full["gradients"]
    assert sum(lora.values()) <= 0.5 * sum(full.values())


def test_a_training_of_all_weights_needs_no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports peft where it is installed; Retort does only for LoRA."""
    for name in [n for n in sys.modules if n.startswith("retort.models.lora")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    import retort.models.lora

    assert retort.models.lora.count_merged(torch.nn.Linear(2, 3)) == 9
