"""`retort estimate` through its command: before a run, beside what the run then took, and where it cannot fit."""

import json
import sys

from retort.cache.cost import CacheCost
from retort.estimate.records import Estimate
from retort.teacher.records import Manifest
from retort.training.record import TrainingRecord
from support.place import Finished, Place, tiny


def estimate(place: Place, *words: str) -> Finished:
    """Type `retort estimate` in a place."""
    return place.execute([sys.executable, "-m", "retort", "estimate", "tiny.yaml", *words])


def read(said: Finished) -> Estimate:
    return Estimate.model_validate_json(said.output[: said.output.rindex("}") + 1])


def test_what_is_said_beforehand_is_what_the_run_takes(done: Place) -> None:
    done.write_config(tiny(output={"results_dir": "none"}))
    before = read(estimate(done, "--json"))
    assert not (done.path / "none").exists()
    done.write_config(tiny())
    manifest = Manifest.read(done.cache / "manifest.json")
    (text,), (cache,) = before.texts, before.caches
    assert (text.tokens, text.sequences, text.positions) == (
        manifest.tokens,
        manifest.sequences,
        manifest.positions,
    )
    assert cache.basis == "sample"
    assert abs(cache.bytes_per_position / manifest.bytes_per_position - 1) < 0.05
    plan = CacheCost.read(done.cache / "plan.json")
    assert plan.basis == "sample" and manifest.file_bytes <= plan.total_bytes
    assert [run.steps for run in before.runs] == [12, 12]
    assert all(run.hours > 0 for run in before.runs) and before.faults == ()
    (record,) = done.results.glob("runs/hard/*/training.json")
    taken = TrainingRecord.read(record)
    measured = before.runs[0].measured_memory
    assert measured and taken.summary.peak_memory
    assert before.runs[0].is_timed and measured > before.runs[0].memory.weights
    (page,) = done.results.glob("reports/*/report.html")
    assert "Estimated and taken" in page.read_text(), "of the estimate that the check kept"
    late = estimate(done, "--no-run", "--keep")
    assert late.returncode == 1 and "the run of this config has begun" in late.output
    table = estimate(done, "--no-run").output
    assert "counted, as tokenized" in table and "assumed:" in table


def test_the_check_says_it_in_short_and_refuses_what_no_gpu_holds(fresh: Place) -> None:
    (fresh.path / "large").mkdir()
    for path in (fresh.path / "teacher").iterdir():  # the shape of a large model, with these ids
        if path.suffix != ".safetensors":
            (fresh.path / "large" / path.name).write_bytes(path.read_bytes())
    config = json.loads((fresh.path / "large" / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    (fresh.path / "large" / "config.json").write_text(json.dumps(config))
    large = {"model_path": "large", "dtype": "bfloat16"}
    fresh.write_config(tiny(teacher=large))
    said = estimate(fresh, "--gpu", "h100-80", "--num-gpus", "8")
    assert said.returncode == 1
    assert "Set teacher.generation.gpus_per_model: 2" in said.output, said.output
    assert estimate(fresh, "--gpu", "h1000").output.count("h100-80") == 1

    tried = fresh.execute([sys.executable, "-m", "retort", "trial", "tiny.yaml"])
    assert tried.returncode == 1
    assert "needs 1" in tried.output and "but this machine has" in tried.output, tried.output
    assert not (fresh.path / "results-trial").exists()

    (fresh.path / "large" / "model.safetensors").write_bytes(b"not read here")
    fresh.write_config(tiny(teacher=large | {"generation": {"gpu_type": "h100-80"}}))
    refused = fresh.try_snakemake("check_inputs")
    assert refused.returncode == 1
    assert "Set teacher.generation.gpus_per_model: 2" in refused.output, refused.output

    fresh.write_config(tiny())
    checked = fresh.snakemake("check_inputs")
    assert "estimate: " in checked and "in all" in checked, checked
    planned = fresh.snakemake("estimate")
    assert "assumed:" in planned and not (fresh.results / "tokens").exists()
