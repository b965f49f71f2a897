"""What a trial is cut to, and that its config is that of the run in all else."""

from pathlib import Path

import pytest
import yaml

from retort.config.config_files import load_source
from retort.config.load import differences
from retort.config.yaml_source import Source, read_yaml
from retort.pipeline.trial_command import Size, choose_runs, write_trial

RAW = {
    "dataset": {"name": "json", "data_files": "a.jsonl", "max_samples": 5000, "num_shards": 9},
    "teacher": {"model_path": "models/teacher"},
    "cache": {"method": "top_p", "temperatures": [1.0]},
    "student": {"config": "student.json"},
    "training": {"temperature": 1.0, "num_epochs": 3, "learning_rate": 0.003},
    "runs": {
        "text": {"training": {"distillation_type": "output", "seed": [0, 1]}},
        "soft": {"training": {"distillation_type": "hybrid", "alpha": 0.1}},
    },
}


def test_a_trial_is_the_run_but_for_its_size_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = load_source(Source(RAW))
    runs = choose_runs(whole)
    assert [name.partition(",")[0] for name in runs] == [next(iter(whole)), "soft"]
    path = write_trial(whole, Size(documents=20, steps=4, runs=runs))
    assert path == Path("results-trial/trial.yaml") and yaml.safe_load(path.read_text())
    cut = load_source(read_yaml(path))
    assert set(cut) == set(runs)
    for name, config in cut.items():
        assert config.output.results_dir == "results-trial"
        assert (config.dataset.max_samples, config.training.max_steps) == (20, 4)
        for section in ("teacher", "cache", "student"):
            assert differences(getattr(config, section)) == differences(
                getattr(whole[name], section)
            )
        assert config.training.alpha == whole[name].training.alpha
        assert config.training.learning_rate == 0.003
