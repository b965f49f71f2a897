"""Samples: which prompts are chosen, that continuations are the model's own, and which files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retort.io.fingerprints import TeacherRecord
from retort.models.generate import sample_model
from retort.models.load import load_pretrained
from retort.models.samples import (
    Sample,
    Samples,
    choose_prompts,
    read_samples,
    require_prompts,
    write_samples,
)
from retort.teacher.features import read_features
from retort.teacher.validation import score_validation
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import build_table
from retort.tokens.tokenizer import load_tokenizer
from support.jobs import make_job
from support.sections import replace, section
from support.tiny import record


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return load_tokenizer(str(tiny_teacher))


def settings(**keys: Any) -> Any:
    return section("evaluation.samples", **keys)


def test_prompts_are_beginnings_of_different_held_out_documents(
    index: TokenIndex, tokenizer: Any
) -> None:
    table = index.read_split("val")
    prompts = choose_prompts(table, tokenizer, settings(num_samples=3))
    firsts = [
        table[i]
        for i in range(len(table))
        if i == 0 or table.documents[i] != table.documents[i - 1]
    ]
    starts = [
        next(n for n, row in enumerate(firsts) if tuple(row.ids[: len(p.ids)]) == p.ids)
        for p in prompts
    ]
    assert len(prompts) == 3 and starts == sorted(set(starts))
    for prompt, place in zip(prompts, starts, strict=True):
        whole = tokenizer.decode(firsts[place].ids.tolist())
        assert prompt.reference and prompt.reference[0].isspace()  # it ends with a word
        assert whole.startswith(prompt.text + prompt.reference)
    assert prompts == choose_prompts(table, tokenizer, settings(num_samples=3))


def test_a_question_ends_where_its_response_begins(tokenizer: Any) -> None:
    ids = list(range(3, 15))
    # Tokens from index 5 on are the response's.
    loss_mask = [t >= 4 for t in range(len(ids) - 1)] + [False]
    table = build_table([(ids, loss_mask, 0, ("", ""))])
    (prompt,) = choose_prompts(table, tokenizer, settings(max_new_tokens=3))
    assert prompt.ids == tuple(ids[:5])
    assert prompt.reference == tokenizer.decode(ids[:8])[len(tokenizer.decode(ids[:5])) :]


def test_own_prompts_come_last_and_none_are_asked_for_by_zero(
    index: TokenIndex, tokenizer: Any
) -> None:
    table = index.read_split("val")
    own = settings(num_samples=1, prompts=("the bird",))
    held_out, mine = choose_prompts(table, tokenizer, own)
    assert held_out.reference is not None
    assert (mine.text, mine.reference) == ("the bird", None)
    assert list(mine.ids) == tokenizer("the bird")["input_ids"]
    assert choose_prompts(table, tokenizer, settings(num_samples=0)) == []
    assert choose_prompts(table.slice(0, 0), tokenizer, settings()) == []


def continue_greedily(model: Any, ids: tuple[int, ...], *, count: int) -> list[int]:
    """The most probable tokens, one forward pass of the whole at a time."""
    found = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_greedy_continuations_are_the_most_probable_and_sampled_ones_follow_the_seed(
    index: TokenIndex, tokenizer: Any, tiny_teacher: Path
) -> None:
    model = load_pretrained(str(tiny_teacher), dtype=torch.float32).eval()
    chosen = settings(num_samples=3, max_new_tokens=8, prompts=("the",))
    prompts = choose_prompts(index.read_split("val"), tokenizer, chosen)

    def sample(**keys: Any) -> Samples:
        return sample_model(model, tokenizer, prompts, replace(chosen, **keys))

    found = sample()
    for prompt, sampled in zip(prompts, found.continued, strict=True):
        ids = continue_greedily(model, prompt.ids, count=8)
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        before = tokenizer.decode(list(prompt.ids), skip_special_tokens=True)
        after = tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)
        assert sampled.greedy == after[len(before) :]
    assert sample() == found
    other = sample(seed=1)
    assert [s.greedy for s in other.continued] == [s.greedy for s in found.continued]
    assert [s.drawn for s in other.continued] != [s.drawn for s in found.continued]


def test_a_model_that_cannot_write_keeps_its_numbers(
    index: TokenIndex, tokenizer: Any, tiny_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_pretrained(str(tiny_teacher), dtype=torch.float32).eval()
    model.generate = None
    prompts = choose_prompts(index.read_split("val"), tokenizer, settings())
    found = sample_model(model, tokenizer, prompts, settings())
    assert found.continued == () and found.missing and "TypeError" in found.missing
    assert caplog.messages == [f"no samples: {found.missing}"]


def test_a_file_gives_back_what_was_written_and_refuses_what_was_changed(
    tmp_path: Path, index: TokenIndex, tokenizer: Any
) -> None:
    prompts = tuple(choose_prompts(index.read_split("val"), tokenizer, settings(num_samples=2)))
    teacher = Samples(prompts, missing="no words")
    student = Samples(prompts, (Sample("a", "b"), Sample("", "\N{GREEK SMALL LETTER PI}")))
    path = tmp_path / "samples.json"
    write_samples(path, {"teacher": teacher, "student": student}, of="abc")
    assert read_samples(path, of="abc", whose="student") == {"teacher": teacher, "student": student}
    text = path.read_text()
    for old, new in (("retort-samples", "other"), ('"greedy"', '"gready"'), ("{", "")):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"samples\.json .*: delete its folder"):
            read_samples(path, of="abc", whose="student")
    whole = json.loads(text)
    first = {**whole["prompts"][0], "text": 5}
    both = {"missing": "why", "continued": whole["models"]["student"]["continued"]}
    student_only = {"models": {"student": whole["models"]["student"]}}
    path.write_text(json.dumps(whole | student_only))
    with pytest.raises(ValueError, match="no entry of the teacher"):
        read_samples(path, of="abc", whose="teacher")
    path.write_text(text)
    with pytest.raises(ValueError, match="is of abc, not of xyz"):
        read_samples(path, of="xyz", whose="student")
    changes: list[dict[str, Any]] = [
        {"models": []},
        {"models": {}},
        {"prompts": [first, *whole["prompts"][1:]]},
        {"models": {"student": both}},
    ]
    for change in changes:
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"samples\.json .*: delete its folder"):
            read_samples(path, of="abc", whose="student")
    path.unlink()
    with pytest.raises(ValueError, match=r"samples\.json .*: delete its folder"):
        read_samples(path, of="abc", whose="student")
    require_prompts(student, list(prompts), source=path)
    with pytest.raises(ValueError, match=r"other prompts \(2\).*given \(1\).*Delete"):
        require_prompts(student, list(prompts[:1]), source=path)


@pytest.mark.parametrize("is_too_wide", [True, False])
def test_a_teacher_is_asked_nothing_about_tokens_of_another_tokenizer(
    is_too_wide: bool,
    tmp_path: Path,
    index: TokenIndex,
    tiny_teacher: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fingerprint = record(tmp_path, tiny_teacher)
    found = TeacherRecord.read(fingerprint)
    files = found.tokenizer.model_copy(update={"fingerprint": "another"})
    width = 299 if is_too_wide else found.vocabulary
    changed = found.model_copy(update={"tokenizer": files, "vocabulary": width})
    changed.write(fingerprint)
    score_validation(
        tmp_path / "features.safetensors",
        make_job(
            teacher=section(
                "teacher",
                model_path="nowhere" if is_too_wide else str(tiny_teacher),
                device="cpu",
            ),
            evaluation=section("evaluation"),
        ),
        index_path=index.path,
        fingerprint_path=fingerprint,
    )
    samples = read_samples(tmp_path / "samples.json", of=changed.weights, whose="teacher")
    assert samples["teacher"].prompts == ()
    assert "different tokenizers" in str(samples["teacher"].missing)
    features = read_features(tmp_path / "features.safetensors")
    assert len(features.features["val"]) == (
        0 if is_too_wide else index.read_split("val").num_positions
    )
    assert ("does not know the tokens" in caplog.text) == is_too_wide


def test_prompts_of_any_kind_are_continued(
    index: TokenIndex, tokenizer: Any, tiny_teacher: Path
) -> None:
    odd = (
        "<script>alert(1)</script>",
        "\N{GRINNING FACE} \N{HEBREW LETTER ALEF}\N{ARABIC LETTER BEH}",
        "   ",
        "\n",
        "word " * 10_000,  # many times the context
        "a\0b",
    )
    model = load_pretrained(str(tiny_teacher), dtype=torch.float32).eval()
    chosen = settings(num_samples=100, prompts=odd, max_new_tokens=4)
    table = index.read_split("val")
    prompts = choose_prompts(table, tokenizer, chosen)
    assert len(prompts) == len(set(table.documents.tolist())) + len(odd)
    found = sample_model(model, tokenizer, prompts, chosen)
    assert len(found.continued) == len(prompts) and found.missing is None
