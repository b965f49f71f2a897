"""Configs for tests of the config: loaded, or refused."""

import typing
from collections.abc import Mapping
from typing import Any

import pytest

from retort.config.load import load_runs
from retort.config.schema import ConfigError, merge
from retort.config.sections import Config

STUDENT = {"student": {"config": "config/students/llama_demo.json"}}
LOGIT = {"training": {"distillation_type": "logit"}}
OUTPUT = {"training": {"distillation_type": "output"}}


def load(*overrides: Mapping[str, Any]) -> Config:
    """Return the config of one run with the demo's student and some overrides."""
    raw: dict[str, Any] = STUDENT
    for override in overrides:
        raw = merge(raw, override)
    return load_runs(raw)["student"]


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the key "a.b"."""
    for step in reversed(key.split(".")):
        value = {step: value}
    return typing.cast(dict[str, Any], value)


def find(config: Config, key: str) -> Any:
    """Return the value of a dotted key in a config."""
    value: Any = config
    for step in key.split("."):
        value = getattr(value, step)
    return value


def refusal(raw: Mapping[str, Any]) -> str:
    """Return the message of the error that refuses a config."""
    with pytest.raises(ConfigError) as caught:
        load_runs(raw)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)
