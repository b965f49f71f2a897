"""What the examples name on the Hub, made small: models of the same families, datasets with the same columns.

Their tokenizers are made by the classes that the published ones name, their layers are as wide as the published ones
where that is the tokenizer's size, and wider where theirs are. Weights are random.
"""

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from support.chat_templates import QWEN_25

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_31_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
_WIDTHS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # at the usual 0.02 every distribution is nearly uniform
}
_LLAMA_31 = {
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_CODE_LLAMA = {"max_position_embeddings": 16384, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
_SMOLLM = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
_GPT2 = {"n_positions": 1024, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
_QWEN = {"max_position_embeddings": 32768, "tie_word_embeddings": True}
# id -> class of the config, class of the tokenizer, keys of the config, ids that the layer has beyond the tokenizer's
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "openai-community/gpt2": ("GPT2Config", "GPT2Tokenizer", _GPT2, 0),
    "openai-community/gpt2-medium": ("GPT2Config", "GPT2Tokenizer", _GPT2, 0),
    "openai-community/gpt2-large": ("GPT2Config", "GPT2Tokenizer", _GPT2, 0),
    "openai-community/gpt2-xl": ("GPT2Config", "GPT2Tokenizer", _GPT2 | {"n_layer": 3}, 0),
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2Config", "Qwen2Tokenizer", _QWEN, 40),
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2Config", "Qwen2Tokenizer", _QWEN, 40),
    "Qwen/Qwen2.5-7B-Instruct": ("Qwen2Config", "Qwen2Tokenizer", _QWEN, 72),
    "mistralai/Mistral-7B-v0.1": (
        "MistralConfig",
        "LlamaTokenizer",
        {"max_position_embeddings": 32768, "sliding_window": 4096},
        0,
    ),
    "meta-llama/Llama-2-13b-hf": (
        "LlamaConfig",
        "LlamaTokenizer",
        {"max_position_embeddings": 4096},
        0,
    ),
    "codellama/CodeLlama-7b-hf": ("LlamaConfig", "CodeLlamaTokenizer", _CODE_LLAMA, 0),
    "codellama/CodeLlama-7b-Instruct-hf": ("LlamaConfig", "CodeLlamaTokenizer", _CODE_LLAMA, 0),
    "codellama/CodeLlama-34b-hf": ("LlamaConfig", "CodeLlamaTokenizer", _CODE_LLAMA, 0),
    "meta-llama/Llama-3.1-8B": ("LlamaConfig", "PreTrainedTokenizerFast", _LLAMA_31, 0),
    "meta-llama/Llama-3.1-70B": ("LlamaConfig", "PreTrainedTokenizerFast", _LLAMA_31, 0),
    "meta-llama/Llama-3.1-405B": ("LlamaConfig", "PreTrainedTokenizerFast", _LLAMA_31, 0),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("LlamaConfig", "GPT2Tokenizer", _SMOLLM, 0),
}
_TEMPLATES = {
    "Qwen/": QWEN_25.template,
    "HuggingFaceTB/": CHATML,
    "codellama/CodeLlama-7b-Instruct-hf": LLAMA_2_CHAT,
}
_SUBJECTS = ("The river", "A small bird", "Her brother", "The old mill", "Nobody", "The café")
_VERBS = ("carried", "found", "built", "forgot", "painted", "counted")
_OBJECTS = ("the stones", "a letter", "seven boats", "the garden wall", "an answer", "its songs")
_FUNCTIONS = ("total", "first", "largest", "joined")
Rows = list[dict[str, Any]]


def write_model(name: str, folder: Path) -> None:
    """Write a model of the Hub, made small: config, weights, tokenizer, settings of generation."""
    import torch
    import transformers

    config_class, tokenizer_class, keys, wider = MODELS[name]
    tokenizer = _make_tokenizer(tokenizer_class, name)
    tokenizer.save_pretrained(folder)
    ids = {k: getattr(tokenizer, f"{k}_id") for k in ("bos_token", "eos_token")}
    shape = {} if config_class == "GPT2Config" else _WIDTHS
    config = getattr(transformers, config_class)(
        **shape, **keys, vocab_size=len(tokenizer) + wider, dtype="bfloat16",
        bos_token_id=ids["bos_token"], eos_token_id=ids["eos_token"], pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)


def _make_tokenizer(kind: str, name: str) -> Any:
    """Return a tokenizer of a class of transformers with the published special tokens and template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    own = getattr(transformers, kind)
    template = next((t for start, t in _TEMPLATES.items() if name.startswith(start)), None)
    if kind in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        vocabulary, merges = _train_pieces(first, is_bytes=False)
        return own(vocab=vocabulary, merges=merges, add_bos_token=True, chat_template=template)
    vocabulary, merges = _train_pieces([], is_bytes=True)
    if kind == "PreTrainedTokenizerFast":  # Llama 3
        from tokenizers.processors import TemplateProcessing

        bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bos, eos = _LLAMA_31_SPECIAL
        tokenizer = own(tokenizer_object=bpe, bos_token=bos, eos_token=eos, model_max_length=131072)
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        return tokenizer
    tokenizer = own(vocab=vocabulary, merges=merges, chat_template=template)
    if kind == "Qwen2Tokenizer" or name.startswith("HuggingFaceTB/"):
        turns = ["<|im_start|>", "<|im_end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": turns})
        tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@cache
def _train(is_bytes: bool) -> dict[str, Any]:
    """Return the vocabulary and the merges of a small BPE, of bytes or of pieces with a sign for the space."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if is_bytes else ["▁"]
    bpe.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if is_bytes
        else pre_tokenizers.Metaspace(split=False)
    )
    size = 330 if is_bytes else 130
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, max_token_length=8, show_progress=False
    )
    bpe.train_from_iterator([*(write_text(i) for i in range(20)), write_code(0)], trainer)
    model: dict[str, Any] = json.loads(bpe.to_str())["model"]
    return model


def _train_pieces(first: list[str], *, is_bytes: bool) -> tuple[dict[str, int], list[Any]]:
    """Return a vocabulary that begins with some tokens, and its merges."""
    model = _train(is_bytes)
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    special = ["<|endoftext|>"] if is_bytes else []
    vocabulary = {token: i for i, token in enumerate([*first, *pieces, *special])}
    return vocabulary, [tuple(pair) for pair in model["merges"]]


def write_text(seed: int) -> str:
    """Return a paragraph; the same for the same seed."""
    chance = random.Random(seed)
    words = (_SUBJECTS, _VERBS, _OBJECTS)
    return " ".join(
        " ".join(chance.choice(options) for options in words) + "." for _ in range(3 + seed % 5)
    )


def write_code(seed: int) -> str:
    """Return a Python file; the same for the same seed."""
    chance = random.Random(seed)
    return "\n\n".join(
        f"def {chance.choice(_FUNCTIONS)}_{i}(values):\n    return sum(values) + {chance.randrange(9)}\n"
        for i in range(2 + seed % 3)
    )


def write_dataset(name: str, folder: Path) -> None:
    """Write a dataset of the Hub, made small: the layout and columns of the published one."""
    folder.mkdir(parents=True)
    DATASETS[name](folder)


def _write_wikitext(folder: Path) -> None:
    """Lines of articles, empty ones between them, as they are there."""
    lines = ["", " = Title = \n", ""]
    for i in range(120):
        lines += [f" {write_text(i)} \n", *([""] if i % 3 == 0 else [])]
    name = "wikitext-103-raw-v1"
    _write_card(folder, {name: {s: f"{name}/{s}-*" for s in ("test", "validation", "train")}})
    for part in range(2):
        rows = [{"text": line} for line in lines[part::2]]
        _write_parquet(folder / name / f"train-{part:05d}-of-00002.parquet", rows)
    for split in ("validation", "test"):
        rows = [{"text": line} for line in lines[:90]]
        _write_parquet(folder / name / f"{split}-00000-of-00001.parquet", rows)


def _write_fineweb(folder: Path) -> None:
    rows = [
        {
            "text": write_text(i),
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2013-20",
            "url": f"http://example.org/{i}",
            "date": "2013-05-18T05:48:54Z",
            "file_path": "s3://commoncrawl/some.warc.gz",
            "language": "en",
            "language_score": 0.95,
            "token_count": 40,
        }
        for i in range(150)
    ]
    paths = {
        "default": "data/*/*",
        "sample-10BT": "sample/10BT/*",
        "sample-100BT": "sample/100BT/*",
    }
    _write_card(folder, {name: {"train": path} for name, path in paths.items()})
    for part in range(2):
        _write_parquet(folder / "sample" / "10BT" / f"{part:03d}_00000.parquet", rows[part::2])
    _write_parquet(folder / "data" / "CC-MAIN-2013-20" / "000_00000.parquet", rows[:2])


def _write_codeparrot(folder: Path) -> None:
    rows = [
        {
            "repo_name": "someone/tools",
            "path": f"tools/part_{i}.py",
            "copies": "1",
            "size": "120",
            "content": write_code(i),
            "license": "mit",
            "hash": -8961024116389042222 + i,
            "line_mean": 20.5,
            "line_max": 42,
            "alpha_frac": 0.6,
            "autogenerated": False,
        }
        for i in range(60)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "file-000000000054.json.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "README.md").write_text("# CodeParrot\n")


def _write_hellaswag(folder: Path) -> None:
    rows = [
        {
            "ind": i,
            "activity_label": "Walking",
            "ctx_a": write_text(i),
            "ctx_b": "then",
            "ctx": f"{write_text(i)} then",
            "endings": [
                f"{verb} {what}." for verb, what in zip(_VERBS[:4], _OBJECTS[:4], strict=True)
            ],
            "source_id": f"activitynet~{i}",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }
        for i in range(12)
    ]
    _write_card(folder, {"default": {s: f"data/{s}-*" for s in ("train", "test", "validation")}})
    for split in ("train", "test", "validation"):
        _write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)


def _write_arc(folder: Path) -> None:
    rows = [
        {
            "id": f"Mercury_{i}",
            "question": f"Who {_VERBS[i % 6]} {_OBJECTS[i % 5]}?",
            "choices": {"text": list(_SUBJECTS[:4]), "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(12)
    ]
    splits = ("train", "test", "validation")
    names = ("ARC-Challenge", "ARC-Easy")
    _write_card(folder, {name: {s: f"{name}/{s}-*" for s in splits} for name in names})
    for name in names:
        for split in splits:
            _write_parquet(folder / name / f"{split}-00000-of-00001.parquet", rows)


def _write_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """Write README.md with the files of each split, as the Hub's viewer and `datasets` read it."""
    import yaml

    listed = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": path} for split, path in files.items()],
        }
        for name, files in configs.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def _write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


DATASETS = {
    "Salesforce/wikitext": _write_wikitext,
    "HuggingFaceFW/fineweb": _write_fineweb,
    "codeparrot/codeparrot-clean-valid": _write_codeparrot,
    "Rowan/hellaswag": _write_hellaswag,
    "allenai/ai2_arc": _write_arc,
}


def write_local_files(folder: Path) -> None:
    """Write a user's files that the examples name: text, pairs, chats in two forms, HumanEval's problems."""
    folder.mkdir(parents=True)
    pairs = [
        {
            "prompt": f"Write a function that sums a list, version {i}.",
            "response": write_code(i),
            "category": ("implement", "repair")[i % 2],
            "language": "python",
        }
        for i in range(40)
    ]
    system = {"role": "system", "content": "Be brief."}
    chats = [
        {
            "messages": [
                *([system] if i % 2 else []),
                {"role": "user", "content": f"What did the bird do on day {i}?"},
                {"role": "assistant", "content": write_text(i)},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": write_text(i + 1)},
            ]
        }
        for i in range(40)
    ]
    notes = [{"text": write_text(100 + i)} for i in range(60)]
    for number in range(20):
        (folder / f"book-{number:02d}.txt").write_text(write_text(200 + number))
    for name, rows in (("train.jsonl", pairs), ("chats.jsonl", chats), ("notes.jsonl", notes)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [
        {
            "conversations": [
                {"from": names[m["role"]], "value": m["content"]} for m in row["messages"]
            ]
        }
        for row in chats
    ]
    (folder / "sharegpt.json").write_text(json.dumps(shared))
    problems = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(a: int, b: int) -> int:\n    """Return a + b + {i}."""\n',
            "entry_point": f"add_{i}",
            "canonical_solution": f"    return a + b + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n",
        }
        for i in range(2)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in problems)
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
