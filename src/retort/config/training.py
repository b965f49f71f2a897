"""The section `training`: how a student is trained."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from retort.config.lora import Lora
from retort.config.optimizer import Beta, LrSchedulerKwargs, Optimizer, Schedule
from retort.config.schema import ConfigError, Found, Problem, find_key
from retort.config.section import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Seed,
    Text,
    Unique,
    setting,
)

if TYPE_CHECKING:
    from retort.config.sections import Config


DEFAULT_ALPHA = {"output": 1.0, "logit": 0.0, "hybrid": 0.5}


class Training(Section):
    """How a student is trained."""

    distillation_type: Literal["output", "logit", "hybrid"] = "hybrid"
    """output learns from the corpus only (cross-entropy), logit from the teacher only, hybrid from both."""
    alpha: Fraction | None = None
    """Weight of the hard loss: total_loss = alpha * hard_loss + (1 - alpha) * soft_loss. null means 1.0 for output, 0.0
    for logit, 0.5 for hybrid. Papers often weigh the soft loss instead."""
    temperature: Positive = 2.0
    """Softens both distributions: soft_loss = T^2 * KL(teacher_T || student_T), in nats. With cached logits it must be
    one of cache.temperatures."""
    temperature_end: Positive | None = None
    """temperature at the last step: it goes there on a straight line from `temperature` at the first step, with a live
    teacher and with cache.top_k full. From any other cache it goes in steps: at each, it is the one of
    cache.temperatures that is nearest to the line, which begins and ends with one of them. null means that temperature
    stays what it is."""
    alpha_end: Fraction | None = None
    """alpha at the last step, of hybrid only: it goes there on a straight line from `alpha` at the first step. null
    means that alpha stays what it is."""
    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
    ] = "forward_kl"
    """The divergence in soft_loss, which is multiplied by T^2: forward_kl, KL(teacher || student), is mode-covering;
    reverse_kl, KL(student || teacher), is mode-seeking; jensen_shannon is between them. skew_forward_kl and
    skew_reverse_kl (DistiLLM) are these two KL, from a mixture with the other model (see skew); total_variation is half
    the sum of |p - q|."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share a of the first model in the mixture of skew_forward_kl, KL(teacher || a * teacher + (1 - a) * student), and
    of skew_reverse_kl, KL(student || a * student + (1 - a) * teacher)."""
    position_weights: Literal["teacher_entropy", "teacher_confidence"] | None = None
    """Weights of soft_loss at each position, from 0 to 1: teacher_entropy is the teacher's entropy / ln(vocabulary),
    more where it is uncertain; teacher_confidence its probability of the text's token, less where it contradicts the
    text. null weighs all alike."""
    use_cached_logits: bool = True
    """Learn from the logit cache; false runs the teacher beside the student instead."""
    cache_copy: Text | None = setting(None, changes_id=False)
    """Folder on the node's own disk or in its memory, such as $TMPDIR or /dev/shm, to which the cache is copied for the
    training; variables are those of the job. null reads the cache where it is. Of a cache in an object store, what is
    read is kept there, up to cache_copy_gb; with null, in the system's folder for temporary files."""
    cache_copy_gb: Annotated[float, Field(ge=0)] = setting(20.0, changes_id=False)
    """How many GB of a cache in an object store (output.cache_dir) are kept on each machine that trains; what is beyond
    is read from the store each time."""
    learning_rate: Positive = 0.0001
    """Peak learning rate."""
    optim: Optimizer = "adamw_torch_fused"
    """The optimizer, by its name in transformers; and muon: PyTorch's Muon for the matrices of the layers, AdamW for
    all else (embeddings, output layer, norms, biases), at one learning_rate. adamw_8bit, paged_... and lion_... need
    bitsandbytes, adamw_torch_8bit and _4bit torchao, stable_adamw torch-optimi."""
    adam_beta1: Beta = 0.9
    """First beta of AdamW and Lion: the decay of the mean of gradients."""
    adam_beta2: Beta = 0.999
    """Second beta of AdamW and Lion: the decay of the mean of squared gradients."""
    adam_epsilon: Positive = 1e-8
    """Epsilon of AdamW."""
    lr_scheduler_type: Schedule = "cosine"
    """Learning rate schedule, by its name in transformers. warmup_stable_decay keeps the rate until the last tenth."""
    lr_scheduler_kwargs: LrSchedulerKwargs = Field(default_factory=LrSchedulerKwargs)
    warmup_steps: NonNegative = 0
    """Optimizer steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, of all weights but biases and those of norms."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this norm; 0 means never."""
    max_steps: Count | None = None
    """Optimizer steps, instead of num_epochs; null means num_epochs."""
    num_epochs: Positive = 1.0
    """Passes over the corpus if max_steps is null; may be a fraction."""
    batch_size: Count = 8
    """Sequences (packed rows, with packing) in one forward pass over all GPUs together. batch_size *
    gradient_accumulation_steps is the global batch."""
    packing: bool | Literal["auto"] = False
    """Fill rows of dataset.max_length with whole sequences that do not see each other; batch_size counts rows then, and
    a step holds more sequences. true refuses a student or a live teacher that mixes them (Mamba, ALiBi), for which auto
    takes batches of sequences of similar length."""
    padding_free: bool | Literal["auto"] = "auto"
    """Lay the sequences of a forward pass end to end, each seeing itself alone, instead of padding them to the longest:
    the losses are equal up to rounding. auto pads for a student or a live teacher that mixes sequences or computes
    attention between all of them (eager); true refuses it."""
    lora: Lora = Field(default_factory=Lora)
    freeze: Unique[Text] = ()
    """Regular expressions: parameters in whose names one of them is found keep their values, such as embed_tokens (of a
    student with tied weights the output layer too) or layers\\.[0-3]\\. (with the last dot, else layers.10 too)."""
    attn_implementation: Text | None = None
    """The student's attention implementation of transformers, such as sdpa, eager, flex_attention or flash_attention_2;
    null lets transformers choose."""
    torch_compile: bool = False
    """Compile the student's layers with torch.compile, which takes minutes once and rounds differently; the loss stays
    as it is."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    seed: Seed = 0
    """Seed of the student's initial weights and of the order of the sequences."""
    loss_chunk_size: Count | None = setting(None, changes_id=False)
    """Positions in one pass through the student's output layer; fewer take less memory, more may be faster. null
    chooses by vocabulary and device."""
    dataloader_num_workers: NonNegative = setting(1, changes_id=False)
    """Processes that read and decode the cache ahead of the steps; 0 does it between steps."""
    use_gradient_checkpointing: bool | Literal["auto"] = setting("auto", changes_id=False)
    """Recompute activations in the backward pass, for less memory and more time; auto does so on a GPU."""
    use_mixed_precision: bool = True
    """Train in mixed_precision_dtype if the device supports it."""
    mixed_precision_dtype: Literal["bf16", "fp16"] = "bf16"
    """Data type of mixed precision."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights in final/, which are what is evaluated; checkpoints keep float32. What the architecture
    keeps in float32 stays so."""
    logging_steps: Count = setting(10, changes_id=False)
    """Optimizer steps between two lines of the log."""
    eval_steps: Count | Literal["auto"] | None = setting("auto", changes_id=False)
    """Optimizer steps between two measurements of the held-out loss (and of the KL from the teacher, if it is learned
    from) while the student is trained; the last step is measured too. auto measures ten times, or less often where that
    would take more than 2 % of the time; null never."""
    eval_sequences: Count = setting(64, changes_id=False)
    """Held-out sequences of these measurements, evenly spaced; the same ones for all runs of a text."""
    metric_for_best_model: Literal["eval_loss", "eval_kl"] | None = None
    """The checkpoint of the evaluation that was lowest in this is kept beside the last ones. null means eval_loss with
    load_best_model_at_end, and no such checkpoint without it."""
    load_best_model_at_end: bool = False
    """Make that checkpoint the finished student, instead of the last step's."""
    save_steps: Count = setting(1000, changes_id=False)
    """Optimizer steps between two checkpoints."""
    save_minutes: Positive | None = setting(10.0, changes_id=False)
    """A checkpoint is also saved when the last one is so many minutes old, or older where saving would take more than
    5 % of the time. null leaves it to save_steps."""
    save_total_limit: Annotated[int, Field(ge=2)] = setting(3, changes_id=False)
    """Checkpoints kept beside the best one, at least 2: a kill can leave the newest one incomplete, and then the one
    before is used."""
    resume_from_checkpoint: Text | None = setting(None, is_path=True)
    """Folder of a checkpoint of another run, whose weights, optimizer, schedule and step this one continues. What would
    contradict them is refused: another learning_rate, weight_decay, optim, beta or epsilon, lr_scheduler_type or its
    kwargs, warmup_steps, lora, freeze, number of sequences of a step, or, where the schedule depends on it, of all
    steps. For its weights alone, name it in student.model_path. Ids depend on its files, not on its path. An
    interrupted run resumes without it."""
    gpus: Count = setting(1, changes_id=False)
    """GPUs per node that train one student together."""
    nodes: Count = setting(1, changes_id=False)
    """Nodes of a SLURM cluster that train one student together, with `gpus` GPUs each."""
    strategy: Literal["ddp", "fsdp"] = setting("ddp", changes_id=False)
    """How several GPUs share the training; with copies of the student (ddp) or shards of it (fsdp)."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", changes_id=False)
    """Where the student is trained; auto uses a GPU if there is one."""
    cpu_threads: Count = 1
    """CPU threads of a training on the CPU. Another number rounds differently, so it changes ids."""

    @property
    def global_batch(self) -> int:
        """Sequences, or packed rows, of an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from a teacher at any step; alpha must be filled in."""
        return self.alpha != 1.0 or self.alpha_end is not None

    @property
    def best_metric(self) -> str | None:
        """What the best checkpoint is chosen by; None if none is kept."""
        return self.metric_for_best_model or ("eval_loss" if self.load_best_model_at_end else None)


def check_alpha(c: "Config") -> Found:
    kind, alpha = c.training.distillation_type, c.training.alpha
    if alpha is None or kind == "hybrid" or alpha == DEFAULT_ALPHA[kind]:
        return
    learns = "the corpus" if kind == "output" else "the teacher"
    yield (
        f"training.alpha is {alpha}, but training.distillation_type is {kind}, which learns from {learns} only: its "
        f"alpha is {DEFAULT_ALPHA[kind]}. Set training.alpha: null, or training.distillation_type: hybrid to learn "
        "from both (alpha is the weight of the hard loss)."
    )


def check_alpha_end(c: "Config") -> Found:
    kind, end = c.training.distillation_type, c.training.alpha_end
    if end is not None and kind != "hybrid":
        yield (
            f"training.alpha_end is {end}, but training.distillation_type is {kind}, whose alpha is "
            f"{DEFAULT_ALPHA[kind]} at every step. Leave training.alpha_end out, or set training.distillation_type: "
            "hybrid."
        )


def check_temperature_end(c: "Config") -> Found:
    kind, end = c.training.distillation_type, c.training.temperature_end
    if end is not None and kind == "output":
        yield (
            f"training.temperature_end is {end}, but training.distillation_type is output, which learns from the "
            "corpus only, at no temperature. Leave training.temperature_end out, or set training.distillation_type: "
            "hybrid or logit."
        )


def check_skew(c: "Config") -> Found:
    divergence, skew = c.training.divergence, c.training.skew
    if skew != Training().skew and not divergence.startswith("skew_"):
        yield (
            f"training.skew is {skew}, but training.divergence is {divergence!r}, which has no skew. Use "
            "training.divergence: skew_forward_kl or skew_reverse_kl, or leave training.skew out."
        )


def check_several_gpus(c: "Config") -> Found:
    size, accumulation = c.training.batch_size, c.training.gradient_accumulation_steps
    yield from _find_uneven_share(size, accumulation, c.training.gpus * c.training.nodes)


def check_strategy(c: "Config") -> Found:
    if c.training.strategy == "fsdp" and c.training.device == "cpu":
        yield (
            "training.strategy is 'fsdp' and training.device is 'cpu', but fsdp shards a student over GPUs. Use "
            "training.strategy: ddp, or another device."
        )


def check_best(c: "Config") -> Found:
    """A best checkpoint needs evaluations at known steps, and what it is chosen by."""
    training = c.training
    if training.best_metric is None:
        return
    if not isinstance(training.eval_steps, int):
        keys = "load_best_model_at_end", "metric_for_best_model"
        key = next(key for key in keys if getattr(training, key))
        yield (
            f"training.{key} is {str(getattr(training, key)).lower()}, but training.eval_steps is "
            f"{training.eval_steps or 'null'}: set it to the number of steps between two evaluations, of which "
            "the best is kept."
        )
    if training.best_metric == "eval_kl" and training.distillation_type == "output":
        yield (
            "training.metric_for_best_model is eval_kl, but training.distillation_type is output, which learns from no "
            "teacher to be compared with. Use training.metric_for_best_model: eval_loss."
        )


def check_sampled(c: "Config") -> Found:
    """Refuse what a cache of samples is biased for."""
    if not _uses_cache(c) or c.cache.method != "sampled":
        return
    if c.training.temperature != 1.0:
        yield (
            f"training.temperature is {c.training.temperature} (the default is {Training().temperature}), but "
            "cache.method is 'sampled': its samples are unbiased at temperature 1 only. Use training.temperature: 1.0, "
            "or cache.method: top_p."
        )
    if c.training.temperature_end not in (None, 1.0):
        yield (
            f"training.temperature_end is {c.training.temperature_end}, but cache.method is 'sampled': its samples are "
            "unbiased at temperature 1 only. Leave training.temperature_end out, or use cache.method: top_p."
        )
    if c.training.divergence != "forward_kl":
        yield (
            f"training.divergence is {c.training.divergence!r}, but cache.method is 'sampled': its samples are "
            "unbiased for forward_kl only, which is linear in the teacher's probabilities. Use training.divergence: "
            "forward_kl, or cache.method: top_p."
        )


def check_sampled_weights(c: "Config") -> Found:
    """Refuse weights that samples give wrongly."""
    weights = c.training.position_weights
    if weights is not None and _uses_cache(c) and c.cache.method == "sampled":
        yield (
            f"training.position_weights is {weights}, but cache.method is 'sampled': the weight and the loss would be "
            "of the same few samples, and their product is biased. Leave training.position_weights out, or use "
            "cache.method: top_p."
        )


def check_mix(c: "Config") -> Found:
    """Refuse what needs the mixture of several teachers itself, where there is only a sum of their losses."""
    training = c.training
    if len(c.teacher.mix) < 2 or training.distillation_type == "output":
        return
    if not training.use_cached_logits:
        yield (
            "training.use_cached_logits is false, but teacher.mix lists several teachers, which would all have to be "
            "in memory beside the student. Use training.use_cached_logits: true, or one teacher."
        )
        return
    if c.cache.top_k == "full" or c.cache.method == "sampled":
        return
    needed = {"divergence": "forward_kl", "position_weights": None}
    for key, value in ((key, getattr(training, key)) for key in needed):
        if value != needed[key]:
            yield (
                f"training.{key} is {value!r}, but teacher.mix lists several teachers, whose mixture is not known from "
                "kept tokens (forward_kl alone is linear in their probabilities). Use training."
                f"{key}: {needed[key] or 'null'}, or cache.top_k: full."
            )


def check_temperature(c: "Config") -> Found:
    if not _uses_cache(c) or c.cache.method == "sampled" or c.cache.top_k == "full":
        return
    stored = list(c.cache.temperatures)
    for key in ("temperature", "temperature_end"):
        temperature = getattr(c.training, key)
        if 1.0 in stored and temperature is not None and temperature not in stored:
            yield (
                f"training.{key} is {temperature}, but the cache stores the mass outside its "
                f"kept tokens at cache.temperatures {stored} only. Add it, cache.temperatures: "
                f"{sorted([*stored, temperature])} (a new cache is made), or use one of {stored}."
            )


def require_even_share(batch_size: int, accumulation: int, gpus: int) -> None:
    """Raise ConfigError when a step's sequences, batch_size * accumulation, are not a multiple of `gpus`."""
    for message in _find_uneven_share(batch_size, accumulation, gpus):
        raise ConfigError(Problem(find_key(message), message))


def _find_uneven_share(batch_size: int, accumulation: int, gpus: int) -> Found:
    if (batch_size * accumulation) % gpus:
        yield (
            f"training.gpus x training.nodes is {gpus}, but training.batch_size {batch_size} x "
            f"training.gradient_accumulation_steps {accumulation} is {batch_size * accumulation} sequences a step, "
            f"which {gpus} GPUs cannot share evenly. Make it a multiple of {gpus}, or use a number of GPUs that "
            "divides it: each trains the same student."
        )


def _uses_cache(c: "Config") -> bool:
    """Return whether a run has a cache made as `cache` says, and learns from it."""
    is_own = c.training.use_cached_logits and c.teacher.imported is None
    return is_own and c.training.distillation_type != "output"
