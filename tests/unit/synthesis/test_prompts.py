"""Prompts from files and templates: order, labels, duplicates, proportions, refusals."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.synthesis.prompts import LabeledPrompt, read_prompts
from support.sections import replace
from support.synthesis import synthesis_section, write_file, write_rows

CATEGORIES = {"do": 0.7, "say": 0.3}
LANGUAGES = {"python": 0.6, "bash": 0.4}
TEMPLATES = {
    "categories": CATEGORIES,
    "languages": LANGUAGES,
    "templates": {"do": ["Do {topic} in {language}."], "say": ["Say {topic}.", "Tell {topic}."]},
    "topics": [f"thing {i}" for i in range(200)],
}


def read_texts(path: str) -> list[str]:
    return [p.text for p in read_prompts(synthesis_section(prompts=path)).prompts]


def test_prompts_keep_their_order_and_labels_and_none_is_asked_twice(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say it.", "category": "a", "language": "en"},
        {"prompt": "  say IT. "},
        {"prompt": " "},
        {"prompt": "Say more.", "language": "python"},
    ]
    found = read_prompts(synthesis_section(prompts=write_rows(tmp_path, rows)))
    assert found.prompts == [
        LabeledPrompt("Say it.", "a", "en"),
        LabeledPrompt("Say more.", None, "python"),
    ]
    assert (found.num_duplicates, found.num_empty) == (1, 1)


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = write_file(tmp_path, "p.txt", "One?\n\nTwo?\nThree?")
    assert read_texts(path) == ["One?", "Two?", "Three?"]


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (("p.txt", "One?\r\nTwo?\r\n"), ("p.csv", "prompt\r\nOne?\r\nTwo?\r\n")):
        assert read_texts(write_file(tmp_path, name, "\ufeff" + text)) == ["One?", "Two?"]


def test_half_a_character_is_refused_before_anything_is_paid(tmp_path: Path) -> None:
    path = write_file(tmp_path, "p.jsonl", '{"prompt": "Whole."}\n{"prompt": "Half \\ud83d."}\n')
    with pytest.raises(ValueError, match=r"prompt 2 of .* half a character") as raised:
        read_texts(path)
    str(raised.value).encode()  # can be printed


def test_files_that_are_missing_or_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"prompt": "x"}])
    with pytest.raises(ValueError, match=r"does not exist .* Did you mean"):
        read_texts(str(tmp_path / "prompt.jsonl"))
    with pytest.raises(ValueError, match="no known ending"):
        read_texts(write_file(tmp_path, "p.docx", "x"))
    with pytest.raises(ValueError, match=r"'question' is not in .* synthesis\.prompt_column"):
        read_prompts(synthesis_section(prompts=path, prompt_column="question"))


def write_templates(folder: Path, **over: Any) -> str:
    return write_file(folder, "t.yaml", yaml.safe_dump(TEMPLATES | over))


@pytest.mark.parametrize("count", [10, 50, 137])
def test_every_prefix_of_filled_templates_has_the_proportions(tmp_path: Path, count: int) -> None:
    section = synthesis_section(prompts=None, templates=write_templates(tmp_path), num_examples=9)
    found = read_prompts(section).prompts[:count]
    counts = Counter((p.category, p.language) for p in found)
    for category, category_weight in CATEGORIES.items():
        for language, language_weight in LANGUAGES.items():
            assert abs(counts[category, language] - category_weight * language_weight * count) <= 2
    assert len({p.text for p in found}) == count


def test_another_seed_asks_in_another_order_and_the_same_one_in_the_same(tmp_path: Path) -> None:
    section = synthesis_section(prompts=None, templates=write_templates(tmp_path), num_examples=9)
    first = read_prompts(section).prompts
    assert read_prompts(section).prompts == first
    assert read_prompts(replace(section, seed=1)).prompts != first


@pytest.mark.parametrize(
    "over, message",
    [
        ({"categories": {"do": 0.7, "say": 0.2}}, "categories sum to 0.9"),
        ({"categories": {"do": 1.0}}, "Give each category its templates"),
        ({"templates": {"do": ["{subject}"], "say": ["x"]}}, "cannot be filled"),
        ({"templates": {"do": ["{topic.name}"], "say": ["{topic[name]}"]}}, "cannot be filled"),
        ({"topics": []}, "has no topics"),
        ({"topic": ["x"]}, "has the keys"),
        ({"languages": ["python"]}, "must give each name a proportion"),
    ],
)
def test_invalid_templates_are_refused(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    path = write_templates(tmp_path, **over)
    with pytest.raises(ValueError, match=message):
        read_prompts(synthesis_section(prompts=None, templates=path))


def test_names_of_languages_and_texts_are_taken_as_written(tmp_path: Path) -> None:
    text = (
        "templates: {on: ['Say {topic} in {language}.', 2024_10]}\n"
        "topics: [yes, 010]\nlanguages: {no: 0.5, en: 0.5}\ncategories: {on: 1}\n"
    )
    section = synthesis_section(prompts=None, templates=write_file(tmp_path, "t.yaml", text))
    found = {(p.text, p.category, p.language) for p in read_prompts(section).prompts}
    assert ("Say yes in no.", "on", "no") in found and ("Say 010 in en.", "on", "en") in found
    assert ("2024_10", "on", "no") in found or ("2024_10", "on", "en") in found


def test_a_template_that_is_not_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_file(tmp_path, "t.yaml", "templates:\n\t- Do it.\ntemplates: [x]\n")
    with pytest.raises(ValueError) as caught:
        read_prompts(synthesis_section(prompts=None, templates=path))
    message = str(caught.value)
    assert "t.yaml:2: this line begins with a tab" in message
    assert "t.yaml:3: templates is set in line 1 already" in message
