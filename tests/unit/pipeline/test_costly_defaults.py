"""Costly defaults are named once, where their keys were left out, and nowhere else."""

from pathlib import Path

from support.checked import Setting


def find(notes: list[str]) -> list[str]:
    """Return the keys of the notes about costly defaults."""
    prefix = "costly default: "
    return [n.removeprefix(prefix).split(" ")[0] for n in notes if n.startswith(prefix)]


def test_keys_that_were_left_out_are_named_with_their_cost_once(setting: Setting) -> None:
    runs = {"soft": {}, "more": {"training": {"alpha": 0.9}}}
    notes = setting.check(runs=runs)
    assert find(notes) == ["cache.method", "training.temperature", "training.learning_rate"]
    (cache,) = (note for note in notes if "cache.method" in note)
    # 64 ids and logprobs of two bytes each, two tails of four.
    assert "top_k 64: up to 264 bytes a position" in cache and "min_probability: 0.001" in cache
    assert any("of this size try 0.003 " in note for note in notes)


def test_what_was_written_is_not_named_even_at_its_default(setting: Setting) -> None:
    written = {"temperature": 2.0, "learning_rate": 1e-4}
    assert find(setting.check(cache={"top_k": 64}, training=written)) == []
    assert find(setting.check(cache={"method": "top_k"}, training=written)) == []
    without_keys = setting.check(cache={"temperatures": [1.0, 2.0]}, training=written)
    assert find(without_keys) == ["cache.method"]


def test_only_what_a_run_uses_is_named(setting: Setting, tiny_teacher: Path) -> None:
    text = {"training": {"distillation_type": "output", "learning_rate": 1e-4}}
    live = {"training": {"use_cached_logits": False, "learning_rate": 1e-4}}
    assert find(setting.check(runs={"text": text})) == []
    assert find(setting.check(runs={"live": live})) == ["training.temperature"]
    pretrained = setting.check(
        student={"config": None, "model_path": str(tiny_teacher)}, cache={"top_k": 8}
    )
    assert find(pretrained) == ["training.temperature"]
