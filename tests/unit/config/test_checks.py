"""Keys that contradict each other are refused."""

from typing import Any

import pytest

from retort.config.load import find_problems
from retort.config.schema import merge
from retort.config.sections import section_at
from support.configs import LOGIT, OUTPUT, STUDENT, load, refusal

STREAM = {"dataset": {"name": "org/corpus", "streaming": True}}
MIX: list[dict[str, Any]] = [
    {"name": "json", "data_files": "a.jsonl", "weight": 2},
    {"name": "owner/texts"},
]
TEACHERS = {"teacher": {"mix": [{"model_path": "a/b"}, {"model_path": "c/d", "weight": 2}]}}


@pytest.mark.parametrize(
    "raw, found, advice",
    [
        (STREAM, "dataset.max_samples is null", "Set dataset.max_samples"),
        (
            merge(STREAM, {"dataset": {"max_samples": 9, "sharding": "contiguous"}}),
            "dataset.sharding is contiguous",
            "Use dataset.sharding: interleaved",
        ),
        (
            {"dataset": {"sharding": "files"}},
            "dataset.sharding is files, but dataset.name is 'demo'",
            "Use dataset.sharding: interleaved",
        ),
        (
            {"dataset": {"name": "org/corpus", "sharding": "files"}},
            "dataset.sharding is files and dataset.name is 'org/corpus'",
            "Set dataset.streaming: true",
        ),
        (
            {"dataset": {"name": "json"}},
            "dataset.name is 'json'",
            "Set dataset.data_files to a path",
        ),
        (
            {"dataset": {"data_files": "a.jsonl"}},
            "dataset.data_files is 'a.jsonl'",
            "Set dataset.name to the loader of your files: one of text, json, parquet, csv",
        ),
        (
            {"dataset": {"prompt_column": "q"}},
            "dataset.prompt_column is 'q', but dataset.response_column is null",
            "Set dataset.response_column too",
        ),
        (
            {"dataset": {"response_column": "a"}},
            "dataset.response_column is 'a', but dataset.prompt_column is null",
            "Set dataset.prompt_column too",
        ),
        (
            {"dataset": {"prompt_column": "q", "response_column": "a", "text_column": "body"}},
            "dataset.text_column is 'body' and dataset.prompt_column is 'q'",
            "Remove one of the two",
        ),
        (
            {"dataset": {"messages_column": "chat", "text_column": "body"}},
            "dataset.messages_column is 'chat' and dataset.text_column is 'body'",
            "Remove one of the two",
        ),
        (
            {"dataset": {"chat_date": "2026-02-30"}},
            "dataset.chat_date is '2026-02-30', which is no date",
            "write year-month-day",
        ),
        (
            {"dataset": {"validation_fraction": 0}},
            "dataset.validation_fraction is 0",
            "Set dataset.validation_fraction above 0",
        ),
        (
            {"dataset": {"validation_split": "train"}},
            "dataset.validation_split is 'train', the same as dataset.split",
            "Name another split",
        ),
        (
            {"dataset": {"validation_split": "test", "validation_fraction": 0.2}},
            "dataset.validation_fraction is 0.2 and dataset.validation_split is 'test'",
            "Remove dataset.validation_fraction",
        ),
        (
            {
                "dataset": {
                    "name": "json",
                    "data_files": "a.jsonl",
                    "validation_files": "b.jsonl",
                    "validation_fraction": 0.2,
                }
            },
            "dataset.validation_fraction is 0.2 and dataset.validation_files is 'b.jsonl'",
            "Remove dataset.validation_fraction",
        ),
        (
            {"dataset": {"name": "owner/texts", "validation_files": ["b.jsonl"]}},
            "dataset.validation_files is [\"b.jsonl\"], but dataset.name is 'owner/texts'",
            "Remove it, or name a dataset.validation_split",
        ),
        (
            merge(LOGIT, {"teacher": {"model_path": None}}),
            "training.distillation_type is logit",
            "Set teacher.model_path to a model",
        ),
        (
            {"teacher": {"model_path": None}},
            "training.distillation_type is hybrid",
            "training.distillation_type: output",
        ),
        (
            merge(OUTPUT, {"teacher": {"model_path": None}}),
            "teacher.model_path and dataset.tokenizer are both null",
            "Set dataset.tokenizer",
        ),
        (
            {"dataset": {"tokenizer": "gpt2"}},
            "dataset.tokenizer is 'gpt2', but teacher.model_path is 'demo'",
            "Set dataset.tokenizer: null",
        ),
        (
            {"teacher": {"generation": {"gpus": "0,1,2", "gpus_per_model": 4}}},
            "teacher.generation.gpus_per_model is 4, but teacher.generation.gpus lists 3: 0,1,2",
            "List at least 4 GPUs, or lower teacher.generation.gpus_per_model",
        ),
        (
            {"teacher": {"generation": {"gpus": ["0,1", "2,3"], "gpus_per_model": 2}}},
            "gpus_per_model is 2, but teacher.generation.gpus is",
            "Remove teacher.generation.gpus_per_model",
        ),
        (
            {"teacher": {"generation": {"gpus": "0,1,1"}}},
            "GPU 1 is listed more than once",
            "List every GPU once",
        ),
        (
            {"teacher": {"generation": {"gpus": ["0,1", "1"]}}},
            "GPU 1 is listed more than once",
            "List every GPU once",
        ),
        (
            {"teacher": {"generation": {"gpus": "0;1"}}},
            "where '0;1' is not a GPU id",
            'such as "0,1,2,3"',
        ),
        ({"teacher": {"generation": {"gpus": "0,"}}}, "where '' is not a GPU id", "Write ids"),
        (
            {"teacher": {"device": "cpu", "generation": {"gpus": "0"}}},
            "teacher.device is cpu, but teacher.generation.gpus is '0'",
            "Remove teacher.generation.gpus",
        ),
        (
            {"cache": {"min_probability": 0.1}},
            "cache.min_probability is 0.1, but cache.method is top_k",
            "Remove cache.min_probability, or set cache.method: top_p",
        ),
        (
            {"cache": {"head_probability": 0.1}},
            "cache.head_probability is 0.1, but cache.method is top_k",
            "Remove cache.head_probability, or set cache.method: sampled",
        ),
        (
            {"cache": {"method": "top_p", "top_k": 8}},
            "cache.top_k is 8, but cache.method is top_p",
            "Remove cache.top_k, or set cache.method: top_k",
        ),
        (
            {"student": {"config": None}},
            "student.config and student.model_path are both null",
            "Set student.config to a transformers config",
        ),
        (
            {"student": {"from_teacher": {"layers": 4}}},
            "student.from_teacher is set (layers 4 of the teacher), and student.config is",
            "Set student.config: null",
        ),
        (
            {
                "student": {
                    "config": None,
                    "from_teacher": {"layers": 2, "layer_indices": [0, 3]},
                }
            },
            "student.from_teacher.layers is 2 and student.from_teacher.layer_indices is [0, 3]",
            "Set one of the two",
        ),
        (
            {"student": {"config": None, "from_teacher": {"layer_indices": [3, 0]}}},
            "student.from_teacher.layer_indices is [3, 0]",
            "Write [0, 3]",
        ),
        (
            merge(
                {"student": {"config": None, "from_teacher": {"layers": 2}}},
                merge(OUTPUT, {"teacher": {"model_path": None}, "dataset": {"tokenizer": "gpt2"}}),
            ),
            "student.from_teacher is set (layers 2 of the teacher), but teacher.model_path is null",
            "student.model_path to the model to prune",
        ),
        (
            {
                "student": {"config": None, "from_teacher": {"layers": 2}},
                "teacher": {"trust_remote_code": True},
            },
            "student.from_teacher is set (layers 2 of the teacher), but teacher.trust_remote_code",
            "Use a teacher that transformers has the code of",
        ),
        (
            {"student": {"model_path": "gpt2"}},
            "student.model_path is 'gpt2'",
            "Set one of the two to null",
        ),
        (
            merge(OUTPUT, {"training": {"alpha": 0.5}}),
            "training.alpha is 0.5, but training.distillation_type is output",
            "Set training.alpha: null, or training.distillation_type: hybrid",
        ),
        (
            merge(LOGIT, {"training": {"alpha": 0.5}}),
            "training.alpha is 0.5, but training.distillation_type is logit",
            "training.distillation_type: hybrid to learn from both",
        ),
        (
            {"training": {"optim": "adafactor", "adam_beta2": 0.9}},
            "training.adam_beta2 is 0.9, but training.optim 'adafactor' has none",
            "Leave the key out",
        ),
        (
            {"training": {"optim": "muon", "strategy": "fsdp"}},
            "training.optim is 'muon', but training.strategy fsdp",
            "Use one of them, or training.strategy: ddp",
        ),
        (
            {"training": {"lr_scheduler_kwargs": {"num_decay_steps": 3}}},
            "training.lr_scheduler_kwargs.num_decay_steps is 3, but training.lr_scheduler_type 'cosine'",
            "warmup_stable_decay have. Leave the key out",
        ),
        (
            {"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
            "training.lr_scheduler_type is 'cosine_with_min_lr', which needs its last rate",
            "such as min_lr_rate: 0.1",
        ),
        (
            {
                "training": {
                    "lr_scheduler_type": "cosine_with_restarts",
                    "lr_scheduler_kwargs": {"num_cycles": 1.5},
                }
            },
            "training.lr_scheduler_kwargs.num_cycles is 1.5",
            "Give a whole number",
        ),
        (
            {
                "training": {
                    "lr_scheduler_type": "warmup_stable_decay",
                    "max_steps": 95,
                    "warmup_steps": 86,
                }
            },
            "training.warmup_steps is 86 and the rate falls in the last 10 steps (a tenth of all)",
            "Lower training.warmup_steps or",
        ),
        (
            {"training": {"freeze": ["layers.[0"]}},
            "training.freeze has 'layers.[0', which is not a regular expression",
            "found in the names of the parameters",
        ),
        (
            {
                "training": {
                    "attn_implementation": "flash_attention_2",
                    "packing": "auto",
                    "padding_free": False,
                }
            },
            "training.attn_implementation is 'flash_attention_2', which keeps packed sequences",
            "Leave that key out, or use sdpa",
        ),
        (
            {
                "training": {
                    "lr_scheduler_type": "polynomial",
                    "lr_scheduler_kwargs": {"lr_end": 1.0},
                }
            },
            "training.lr_scheduler_kwargs.lr_end, the last rate, is 1.0, but training.learning_rate, the highest",
            "Give a lower last rate",
        ),
        (
            {"training": {"attn_implementation": "flex_attention", "device": "cpu"}},
            "training.attn_implementation is 'flex_attention', but training.device is cpu",
            "Use one of them, or leave the key out",
        ),
        (
            {"training": {"torch_compile": True, "strategy": "fsdp"}},
            "training.torch_compile is true, but training.strategy is fsdp",
            "training.torch_compile: false",
        ),
        (
            {"training": {"lora": {"rank": 8}}},
            "training.lora.rank is 8, but student.config is 'config/students/llama_demo.json'",
            "or training.lora: null",
        ),
        (
            {"training": {"lora": {"alpha": 8}}},
            "training.lora.alpha is 8, but training.lora.rank is null",
            "Set training.lora.rank, such as 16",
        ),
        (
            {
                "student": {"config": None, "model_path": "gpt2"},
                "training": {"lora": {"rank": 8}, "freeze": ["norm"]},
            },
            'training.lora.rank is 8 and training.freeze is ["norm"]',
            "Leave training.freeze out",
        ),
        (
            {
                "student": {"config": None, "model_path": "gpt2"},
                "training": {"lora": {"rank": 8}, "strategy": "fsdp"},
            },
            "training.lora.rank is 8 and training.strategy is 'fsdp'",
            "Use training.strategy: ddp",
        ),
        (
            {
                "student": {"config": None, "model_path": "gpt2"},
                "training": {"lora": {"rank": 8}, "torch_compile": True},
            },
            "training.lora.rank is 8 and training.torch_compile is true",
            "Use training.torch_compile: false",
        ),
        (
            {
                "student": {"config": None, "model_path": "gpt2", "grow_embedding": True},
                "training": {"lora": {"rank": 8}},
            },
            "training.lora.rank is 8 and student.grow_embedding is true",
            "or a student of the same tokenizer",
        ),
        (
            {
                "cache": {"method": "sampled", "temperatures": [1.0, 4.0]},
                "training": {"temperature": 1.0},
            },
            "cache.temperatures is [1.0, 4.0], but cache.method is 'sampled'",
            "Leave cache.temperatures out",
        ),
        (
            {
                "cache": {"method": "sampled"},
                "training": {"temperature": 1.0, "divergence": "reverse_kl"},
            },
            "training.divergence is 'reverse_kl', but cache.method is 'sampled'",
            "Use training.divergence: forward_kl, or cache.method: top_p",
        ),
        (
            {
                "cache": {"method": "sampled"},
                "training": {"temperature": 1.0, "position_weights": "teacher_entropy"},
            },
            "training.position_weights is teacher_entropy, but cache.method is 'sampled'",
            "Leave training.position_weights out, or use cache.method: top_p",
        ),
        (
            merge(LOGIT, {"training": {"alpha_end": 0.5}}),
            "training.alpha_end is 0.5, but training.distillation_type is logit",
            "Leave training.alpha_end out, or set training.distillation_type: hybrid",
        ),
        (
            {
                "teacher": {
                    "model_path": "a/b",
                    "mix": [{"model_path": "c/d"}, {"model_path": "e/f"}],
                }
            },
            "teacher.model_path is 'a/b', but teacher.mix lists 'c/d', 'e/f' only",
            "or set teacher.model_path to one of these",
        ),
        (
            {"teacher": {"model_path": "a/b", "mix": [{}, {"weight": 2}]}},
            "teacher.mix[1] is 'a/b', which teacher.mix lists already",
            "give it the sum of the weights",
        ),
        (
            {"teacher": {"mix": [{"model_path": "a/b"}, {}]}},
            "teacher.mix[1].model_path is 'demo', but only models that exist can be mixed",
            "Give teacher.mix[1].model_path: a Hub id or a folder",
        ),
        (
            merge(TEACHERS, {"training": {"use_cached_logits": False}}),
            "training.use_cached_logits is false, but teacher.mix lists several teachers",
            "Use training.use_cached_logits: true, or one teacher",
        ),
        (
            merge(TEACHERS, {"training": {"divergence": "reverse_kl"}}),
            "training.divergence is 'reverse_kl', but teacher.mix lists several teachers",
            "Use training.divergence: forward_kl, or cache.top_k: full",
        ),
        (
            merge(TEACHERS, {"training": {"position_weights": "teacher_entropy"}}),
            "training.position_weights is 'teacher_entropy', but teacher.mix lists several teachers",
            "Use training.position_weights: null, or cache.top_k: full",
        ),
        (
            {"training": {"temperature_end": 1.5}},
            "training.temperature_end is 1.5, but the cache stores the mass outside its kept tokens at",
            "cache.temperatures: [1.0, 1.5, 2.0]",
        ),
        (
            {"training": {"distillation_type": "output", "temperature_end": 1.0}},
            "training.temperature_end is 1.0, but training.distillation_type is output",
            "Leave training.temperature_end out",
        ),
        (
            {
                "cache": {"method": "sampled"},
                "training": {"temperature": 1.0, "temperature_end": 2.0},
            },
            "training.temperature_end is 2.0, but cache.method is 'sampled'",
            "Leave training.temperature_end out, or use cache.method: top_p",
        ),
        (
            {"training": {"skew": 0.3}},
            "training.skew is 0.3, but training.divergence is 'forward_kl'",
            "Use training.divergence: skew_forward_kl or skew_reverse_kl",
        ),
        (
            {"training": {"load_best_model_at_end": True}},
            "training.load_best_model_at_end is true, but training.eval_steps is auto",
            "set it to the number of steps between two evaluations",
        ),
        (
            {"training": {"metric_for_best_model": "eval_loss", "eval_steps": None}},
            "training.metric_for_best_model is eval_loss, but training.eval_steps is null",
            "set it to the number of steps between two evaluations",
        ),
        (
            merge(OUTPUT, {"training": {"metric_for_best_model": "eval_kl", "eval_steps": 4}}),
            "training.metric_for_best_model is eval_kl, but training.distillation_type is output",
            "Use training.metric_for_best_model: eval_loss",
        ),
        (
            {"training": {"temperature": 3}},
            "training.temperature is 3.0",
            "cache.temperatures: [1.0, 2.0, 3.0] (a new cache is made), or use one of [1.0, 2.0]",
        ),
        *(
            (
                {"output": {"cache_dir": url}},
                f"output.cache_dir is '{url}', which is neither a folder nor an object store",
                "give s3://bucket/prefix",
            )
            for url in ("az://bucket/a", "gs://My/a", "s3://", "s3://My_Bucket/a", "s3://bucket//a")
        ),
        (
            {"output": {"results_dir": "s3://bucket/a"}},
            "output.results_dir is 's3://bucket/a', but results are files",
            "An object store can hold the caches' parts: output.cache_dir",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    raw: dict[str, Any], found: str, advice: str
) -> None:
    message = refusal(merge(STUDENT, raw))
    assert found in message and advice in message, message
    (problem,) = find_problems(merge(STUDENT, raw))[1]
    path = [int(step) if step.isdigit() else step for step in problem.path]
    if isinstance(path[-1], int):  # an item of a list
        assert section_at(path) is not None
        return
    section = section_at(path[:-1])
    assert section is not None and path[-1] in section.model_fields


@pytest.mark.parametrize(
    "raw",
    [
        merge(STREAM, {"dataset": {"max_samples": 9}}),
        {"training": {"temperature": 3.0, "use_cached_logits": False}},
        {"training": {"temperature": 3.0}, "cache": {"top_k": "full"}},
        merge(OUTPUT, {"training": {"temperature": 3.0, "alpha": 1.0}}),
        merge(LOGIT, {"training": {"alpha": 0.0}}),
        {"dataset": {"validation_split": "test", "validation_fraction": 0}},
        {"dataset": {"name": "org/corpus", "data_files": "en/*.parquet"}},
        {"dataset": {"name": "json", "data_files": "a.jsonl", "validation_files": "b.jsonl"}},
        {"dataset": {"mix": MIX, "validation_fraction": 0.2}},
        {"dataset": {"mix": [MIX[0], MIX[1] | {"validation_split": "test"}]}},
        {"teacher": {"generation": {"gpus": "1, 3,5", "gpus_per_model": 2}}},
        {"teacher": {"generation": {"gpus": "GPU-8f2c,MIG-GPU-8f2c/1/0"}}},
        {"training": {"max_steps": 5, "num_epochs": 2}},
        {"tracking": {"use_wandb": True, "wandb_project": "p", "use_tensorboard": True}},
    ],
)
def test_configs_without_a_contradiction_are_accepted(raw: dict[str, Any]) -> None:
    load(raw)


@pytest.mark.parametrize("kind, alpha", [("output", 1.0), ("logit", 0.0), ("hybrid", 0.5)])
def test_alpha_follows_the_distillation_type_and_is_never_null(kind: str, alpha: float) -> None:
    assert load({"training": {"distillation_type": kind}}).training.alpha == alpha


def test_gpus_that_cannot_share_a_step_or_a_student_are_refused() -> None:
    message = refusal(merge(STUDENT, {"training": {"gpus": 3, "batch_size": 4}}))
    assert "training.gpus x training.nodes is 3" in message and "is 4 sequences a step" in message
    message = refusal(merge(STUDENT, {"training": {"strategy": "fsdp", "device": "cpu"}}))
    assert "training.strategy is 'fsdp' and training.device is 'cpu'" in message
