"""Attention with a softcap (Gemma 2), which not every implementation of transformers computes."""

import logging

from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def has_softcap(config: PretrainedConfig) -> bool:
    """Return whether a model's attention scores go through a softcap."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def keep_softcap(model: PreTrainedModel) -> None:
    """Let a model whose attention has a softcap (Gemma 2) use eager attention where transformers chose sdpa.

    sdpa leaves the softcap out: some versions of transformers choose it, others refuse it.
    """
    if has_softcap(model.config) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        logger.info(
            f"{type(model).__name__} uses eager attention: its attention has a softcap, which sdpa leaves out. "
            "teacher.attn_implementation flex_attention or flash_attention_2 are faster for a teacher on a GPU."
        )
