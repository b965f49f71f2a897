"""Files that change or break between two steps are refused or made again."""

import json
import shutil
import signal
from pathlib import Path

from retort.cache.reader import LogitCache
from retort.teacher.records import CacheRun
from support.place import TINY, Place, sha256, tiny, wait_until


def test_results_may_be_in_folders_of_any_name(fresh: Place) -> None:
    folders = {"results_dir": "my results/it's here", "cache_dir": "the cache"}
    fresh.write_config(tiny(output=folders, runs={"both": TINY["runs"]["both"]}))
    fresh.snakemake()
    assert (fresh.path / "my results" / "it's here" / "report.html").exists()
    again = fresh.snakemake()
    assert "Nothing to be done" in again
    assert "Report of this config: my results/it's here/report.html" in again


def test_damaged_and_lost_parts_are_made_again_by_the_same_command(done: Place) -> None:
    cache = done.cache
    undisturbed = sha256(cache / "teacher_logits.h5")
    for name in ("teacher_logits.h5", "manifest.json"):
        (cache / name).unlink()
    target = str((cache / "manifest.json").relative_to(done.path))
    receipts = [target.replace("manifest", f"metadata_worker{w}") for w in (0, 1)]
    done.snakemake(*receipts, "--notemp")
    damaged, lost, *good = sorted((cache / "parts").glob("*.h5"))
    content = damaged.read_bytes()
    at = content.index(LogitCache(damaged).read_record(0)) + 3
    damaged.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    lost.unlink()
    kept = {path: path.stat().st_ino for path in good}

    refused = done.try_snakemake(target)
    assert refused.returncode != 0
    assert f"2 of {len(good) + 2} parts cannot be merged" in refused.output
    assert str(damaged.relative_to(done.path)) in refused.output
    assert "Traceback" not in refused.output
    assert {path: path.stat().st_ino for path in good} == kept

    done.snakemake(target)
    assert sha256(cache / "teacher_logits.h5") == undisturbed
    workers = CacheRun.read(cache / "run.json").workers
    assert sum(len(worker.parts_done) for worker in workers) == 2


def edit_while_checking(place: Place, path: Path, old: str, new: str) -> str:
    """Start the command and edit a file after ids are computed, before it is read; return the output."""
    text = path.read_text()
    assert old in text
    command = place.start(is_real=False)
    try:
        wait_until(lambda: list(place.path.glob("logs/check_inputs/*.log")), process=command)
        path.write_text(text.replace(old, new))
        assert command.wait() != 0
    finally:
        if command.poll() is None:
            command.send_signal(signal.SIGKILL)
    path.write_text(text)
    return (place.path / "started.log").read_text()


def test_a_corpus_edited_while_it_is_read_makes_nothing(fresh: Place) -> None:
    corpus = fresh.path / "documents.jsonl"
    text = corpus.read_text()
    said = edit_while_checking(fresh, corpus, "garden", "desert")
    assert "documents.jsonl' changed while Retort read them" in said
    assert not list(fresh.results.glob("tokens/*/shard_*.h5"))
    corpus.write_text(text.replace("garden", "desert"))
    fresh.snakemake("--until", "index_tokens")  # of the edited text, with its own id
    (edited,) = fresh.results.glob("tokens/*/index.json")
    corpus.write_text(text)
    assert edited.parent.name not in fresh.find_output(r"^results/tokens/\w+/index\.json$")


def test_a_student_edited_before_it_is_built_is_not_trained_under_the_old_id(
    done: Place,
) -> None:
    for folder in ("runs", "reports"):
        shutil.rmtree(done.results / folder)
    for path in (
        *done.path.glob("logs/check_inputs/*.log"),
        *done.results.glob("checks/*/inputs.json"),
    ):
        path.unlink()
    said = edit_while_checking(done, done.path / "student.json", "8", "16")
    assert "student.json changed since the command began" in said
    assert not list(done.results.glob("runs/*/*/training.json"))


def test_a_tokenizer_edited_before_it_is_read_makes_no_tokens(fresh: Place) -> None:
    shutil.copytree(fresh.path / "teacher", fresh.path / "tokenizer")
    output = {"hard": {"training": {"distillation_type": "output"}}}
    no_teacher = {"model_path": None}
    fresh.write_config(
        tiny(dataset={"tokenizer": "tokenizer"}, teacher=no_teacher, cache=None, runs=output)
    )
    path = fresh.path / "tokenizer" / "tokenizer.json"
    said = edit_while_checking(fresh, path, '"padding": null', '"padding":  null')
    assert "tokenizer in 'tokenizer' changed since the command began" in said
    assert not list(fresh.results.glob("tokens/*/shard_*.h5"))


def test_an_edited_tokenizer_is_not_shipped_with_a_student(fresh: Place) -> None:
    fresh.snakemake("--until", "index_tokens")
    tokenizer = fresh.path / "teacher" / "tokenizer.json"
    edited = json.loads(tokenizer.read_text())
    edited["model"]["merges"] = edited["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(edited))
    refused = fresh.try_snakemake()
    assert refused.returncode != 0
    assert "holds other tokenizer files than before" in refused.output
    assert not list(fresh.results.glob("runs/*/*/final"))


def test_two_results_folders_of_one_cache_agree_on_the_teacher(done: Place) -> None:
    cache = {"cache_dir": "results"}
    other = done.write_config(tiny(output=cache | {"results_dir": "other"}))
    assert "resolve_teacher" not in done.plan(config=other.name)
    weights = done.path / "teacher" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = done.try_snakemake("-n", config=other.name)
    assert refused.returncode != 0
    assert "holds other weights than before" in refused.output
    assert not Path(done.path / "other").exists()
