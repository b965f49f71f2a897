"""What is suggested for an unknown key is what was meant, or nothing."""

import dataclasses

import pytest
import yaml

from retort.config.load import complete, find_problems
from retort.config.schema import ConfigError
from retort.config.sections import key_paths, section_paths
from retort.config.suggestions import _other_names, closest, unknown_key

OUR_KEYS = list(key_paths())
PLACES = {".".join(path) for path in [*OUR_KEYS, *section_paths()]}
# Names of earlier versions of transformers and TRL, of transformers' example run_clm.py, and of from_pretrained.
EARLIER = {
    *(
        "warmup_ratio",
        "evaluation_strategy",
        "logging_dir",
        "overwrite_output_dir",
        "no_cuda",
        "group_by_length",
    ),
    *(
        "dataset_name",
        "dataset_config_name",
        "train_file",
        "validation_file",
        "max_train_samples",
        "block_size",
    ),
    *("validation_split_percentage", "preprocessing_num_workers", "tokenizer_name", "cache_dir"),
    *(
        "torch_dtype",
        "device_map",
        "low_cpu_mem_usage",
        "early_stopping_patience",
        "max_seq_length",
    ),
    *("dataset_train_split", "dataset_test_split", "loss_top_k", "lora_target_modules"),
}


def names() -> dict[str, dict[str, str]]:
    """Return other_names.yaml."""
    from importlib.resources import files

    text = (files("retort.config") / "other_names.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = yaml.safe_load(text)
    return found


def test_other_names_lead_to_keys_that_exist_or_say_what_to_do() -> None:
    assert sum(len(of_tool) for of_tool in names().values()) >= 80
    assert len(_other_names()) == sum(map(len, names().values())), "no name twice"
    for name, text in _other_names().items():
        keys, _, note = text.partition("|")
        places = [key.strip() for key in keys.split(",") if key.strip()]
        assert set(places) <= PLACES and (places or note.strip()), (name, text)
        assert not note or note.rstrip()[-1] == ".", (name, note)
        assert name not in PLACES, f"{name} is a key of ours"


def test_names_of_transformers_and_trl_are_those_of_the_installed_versions() -> None:
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    from trl.experimental.distillation import DistillationConfig
    from trl.experimental.gkd import GKDConfig

    classes = (
        transformers.TrainingArguments,
        trl.SFTConfig,
        trl.ModelConfig,
        trl.ScriptArguments,
        GKDConfig,
    )
    known = {
        field.name for of in (*classes, DistillationConfig) for field in dataclasses.fields(of)
    }
    for tool in ("transformers", "TRL"):
        assert set(names()[tool]) - known <= EARLIER, set(names()[tool]) - known - EARLIER
    assert known & EARLIER <= {
        "dataset_train_split",
        "dataset_test_split",
        "dataset_name",
        "lora_target_modules",
    }


@pytest.mark.parametrize(
    "key, never",
    [
        ("training.evals_per_epoch", "num_epochs"),
        ("training.min_steps", "max_steps"),
        ("training.top_p", "top_k"),
        ("cache.top_p", "cache.top_k"),
        ("training.save_strategy", "training.strategy"),
        ("teacher.max_length", "max_grad_norm"),
        ("training.num_steps", "warmup_steps"),
        ("training.eval_batch_size", "training.batch_size"),
        ("lora", "alpha"),
        ("training.lora_alpha", "training.alpha"),
        ("evaluation.max_samples", "max_positions"),
        ("training.beta", "alpha"),
        ("training.gamma", "alpha"),
    ],
)
def test_no_hint_crosses_into_another_meaning(key: str, never: str) -> None:
    message = unknown_key(tuple(key.split(".")), {"alpha": "16"} if key == "lora" else "1")
    hint = message.removeprefix(f"Unknown config key {key}.")
    assert f"mean {never}" not in hint and f".{never}?" not in hint and f"as {never}" not in hint, (
        message
    )


@pytest.mark.parametrize(
    ("name", "ours"),
    [("tvd", "total_variation"), ("skew_kl", "skew_forward_kl"), ("rkl", "reverse_kl")],
)
def test_losses_by_their_names_elsewhere(name: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean .?{ours}"):
        complete({"training": {"divergence": name}})


def test_the_rank_by_its_name_in_peft() -> None:
    assert "as training.lora.rank: 8" in unknown_key(("training", "lora", "r"), "8")


def test_a_key_with_one_slip_is_recognized_and_none_is_taken_for_another() -> None:
    wrong = 0
    for path in OUR_KEYS:
        name = path[-1]
        siblings = {p[-1] for p in OUR_KEYS if p[:-1] == path[:-1]}
        for at in range(1, len(name) - 1):
            slip = name[:at] + name[at + 1] + name[at] + name[at + 2 :]  # two letters swapped
            found = closest(slip, siblings - {slip})
            wrong += found is None and slip != name
            assert found in (name, None) or slip in siblings or found == slip, (slip, found)
        assert closest(name.replace("_", "-"), siblings) == name
        assert closest(name.upper(), siblings) == name
        others = siblings - {name}
        near = closest(name, others)
        assert near is None or {name, near} == {name.rstrip("s"), name.rstrip("s") + "s"}, (
            name,
            near,
        )
    assert wrong < 900, "letters of short words, and around an underscore, are not guessed"


def test_unknown_keys_beside_a_wrong_section_are_all_told() -> None:
    _, problems = find_problems(
        {"student": {"config": "s"}, "trainer": {"lr": 1}, "hard": {"training": {}}}
    )
    said = [message for _, message in problems]
    assert said[0] == "Unknown config key trainer. Write it as training."
    assert said[1] == "Unknown config key hard. If it is a run, indent it below runs."
