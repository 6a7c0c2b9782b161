"""A task: one tenant's fine-tuning job, its fields with their types, bounds and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lobra.common.models import (
    AtMost,
    Count,
    FileModel,
    Flag,
    FolderName,
    Mistake,
    NotNegative,
    NumTokens,
    OneOf,
    Positive,
    PositiveInt,
    Rank,
    Share,
    Text,
    Wanted,
    wanted,
)
from lobra.tasks.contradictions import contradictions
from lobra.tasks.foreign_names import foreign_field
from lobra.tasks.kinds import ADAPTERS, BIASES, FULL, LR_SCHEDULERS, OF_ADAPTERS, OPTIMIZERS
from lobra.tasks.objectives import OBJECTIVES, SUPERVISED
from lobra.tasks.patterns import pattern_problem
from lobra.tasks.prompts import NAMES, template_problem
from lobra.tasks.target_modules import ADAPTED_MODULES, MODULE_ALIASES, resolve_target_modules

_MODULES = (*ADAPTED_MODULES, *MODULE_ALIASES)


def _listed(value: Any) -> list[Any]:
    """Return the names of modules as a list, where one is given without."""
    if isinstance(value, str) and value in _MODULES:
        return [value]
    if not isinstance(value, list) or not value:
        raise wanted(f"a list of {', '.join(_MODULES)}", _MODULES)
    return value


def _one_or_more(value: Any) -> Any:
    """Return one text as a list, anything else as it is."""
    return [value] if isinstance(value, str) else value


def _checked_prompt(value: str) -> str:
    if problem := template_problem(value):
        raise PydanticCustomError("template", problem)  # type: ignore[arg-type]
    return value


_Module = Annotated[str, OneOf(_MODULES)]
_Several = Annotated[list[_Module], Field(min_length=1)]
_Modules = Annotated[
    tuple[_Module, ...],
    BeforeValidator(_listed, json_schema_input_type=_Module | _Several),
    AfterValidator(resolve_target_modules),
]
_Names = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)],
    AfterValidator(lambda names: names if isinstance(names, str) or names[1:] else names[0]),
    Wanted("a text that is not empty, or a list of such texts"),
]
_Prompt = Annotated[
    str,
    Field(strict=True, examples=list(NAMES)),
    Wanted("a text"),
    AfterValidator(_checked_prompt),
]
_Norms = Annotated[
    tuple[Text, ...], BeforeValidator(_one_or_more, json_schema_input_type=Text | list[Text])
]
_Scheduler = Annotated[str, OneOf(LR_SCHEDULERS)]
_Adapter = Annotated[str, OneOf((*ADAPTERS, FULL))]
_Optimizer = Annotated[str, OneOf(OPTIMIZERS)]


def _checked_patterns(patterns: dict[str, Any]) -> dict[str, Any]:
    for pattern in patterns:
        if problem := pattern_problem(pattern):
            text = f"want names of linears, but {problem}"
            raise PydanticCustomError("pattern", text)  # type: ignore[arg-type]
    return patterns


#: A factor of what is learned; those in use are below a thousand.
_Factor = AtMost(10**6)
_Alpha = Annotated[Positive, _Factor]
_Weight = Annotated[NotNegative, _Factor]
_Ranks = Annotated[dict[Text, PositiveInt], AfterValidator(_checked_patterns)]
_Alphas = Annotated[dict[Text, _Alpha], AfterValidator(_checked_patterns)]


def _alternatives(schema: dict[str, Any]) -> None:
    """Say in a task's JSON Schema what its fields alone do not."""
    of_adapters = [name for name in schema["required"] if name in OF_ADAPTERS]
    schema["required"] = [name for name in schema["required"] if name not in ("name", *of_adapters)]
    schema["if"] = {"properties": {"adapter": {"const": FULL}}, "required": ["adapter"]}
    schema["else"] = {"required": of_adapters}
    schema["anyOf"] = [{"required": ["steps"]}, {"required": ["epochs"]}]


@dataclass(frozen=True)
class TaskConfig(FileModel):
    """One tenant's fine-tuning job."""

    __pydantic_config__ = ConfigDict(
        **FileModel.__pydantic_config__, json_schema_extra=_alternatives
    )

    name: FolderName
    """The adapter's folder; the task in metrics and reports."""
    rank: Rank
    """Rank of the adapter, LoRA's r."""
    lora_alpha: _Alpha
    """The adapter is scaled by lora_alpha / rank (rslora: by lora_alpha / sqrt(rank))."""
    target_modules: _Modules
    """all-linear, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,
    embed_tokens and lm_head."""
    global_batch_size: Annotated[PositiveInt, AtMost(2**20)]
    """Sequences of this task in every step, over all devices; examples of objectives that
    compare answers."""
    dataset_name: _Names
    """<data-dir>/<name>.jsonl, a path, an embedded task, or owner/name of the Hugging Face hub; of
    several, the rows one after another."""
    context_length: NumTokens
    """Most tokens of a sequence; longer ones are cut."""
    json_key: Text | None = None
    """The field that holds the text of a row without instructions, if not text."""
    max_samples: PositiveInt | None = None
    """At most so many rows of each of its data sets, the first ones."""
    steps: Annotated[PositiveInt, AtMost(10**9)] | None = None
    """Steps of this task; steps or epochs must be given."""
    epochs: Annotated[PositiveInt, AtMost(10**6)] = 1
    """Passes over its data, where steps is not given."""
    learning_rate: Annotated[Positive, AtMost(10, "AdamW moves a weight by it in a step")] = 1e-4
    """The optimiser's step size."""
    weight_decay: NotNegative = 0.0
    """The optimiser's: AdamW's decoupled one, SGD's added to the gradient."""
    optimizer: _Optimizer = "adamw"
    """Of this task; adamw8bit keeps its moments in 8 bits."""
    adam_beta1: Share = 0.9
    """AdamW's share of the old mean gradient in the new."""
    adam_beta2: Share = 0.999
    """AdamW's share of the old mean square in the new."""
    adam_epsilon: Positive = 1e-8
    """What AdamW adds to the root of the mean square."""
    momentum: Share = 0.0
    """SGD's share of the old direction in the new."""
    loraplus_ratio: Annotated[Positive, _Factor] = 1.0
    """LoRA+: B and vectors learn at so many times the learning rate."""
    lr_scheduler: _Scheduler = "constant"
    """Over the task's own steps, as in transformers."""
    warmup_steps: Annotated[Count, AtMost(10**9)] = 0
    """Steps in which the learning rate rises from 0."""
    max_grad_norm: Annotated[NotNegative, Wanted("a number of 0 or more (0: no clipping)")] = 1.0
    """The norm the task's gradient is clipped to; 0: never."""
    lora_dropout: Annotated[Share, AtMost(0.999, "what is left is scaled up by the rest")] = 0.0
    """Dropout before the adapter, in training."""
    seed: Count = 0
    """Of the adapter's first values and the order of the sequences."""
    prompt: _Prompt = "auto"
    """How a row becomes text; a template is such as "Q: {instruction} {input}\\nA: {output}"."""
    train_on_inputs: Flag = False
    """Learn the prompt's tokens too, not only the answer's."""
    validation_split: Share = 0.0
    """Share of the sequences held out to measure their loss."""
    early_stopping_patience: Count = 0
    """End after so many evaluation periods without a better loss, and export the adapter with the
    lowest validation loss; 0: never, and export the last."""
    early_stopping_min_delta: NotNegative = 0.0
    """By how much a loss must fall to be better."""
    objective: Annotated[str, OneOf(OBJECTIVES)] = SUPERVISED
    """What is learned: every token, wanted answers (dpo, cpo, orpo, kto), the same answer to two
    wordings (cit), or sampled tokens by their advantages (ppo)."""
    beta: Annotated[Positive, _Factor] = 0.1
    """Of dpo, cpo, orpo, kto: the factor of differences of log-probabilities."""
    cpo_alpha: _Weight = 1.0
    """Of cpo: what the mean loss of the chosen answers' tokens counts for."""
    desirable_weight: _Weight = 1.0
    """Of kto: what an answer with label true counts for."""
    undesirable_weight: _Weight = 1.0
    """Of kto: what an answer with label false counts for."""
    contrast_weight: _Weight = 1.0
    """Of cit: what the contrast of pairs counts for, at most as much as the tokens' loss."""
    temperature: Positive = 0.05
    """Of cit: what the likeness of two sequences is divided by."""
    clip_low: Share = 0.8
    """Of ppo: the least that the ratio of a token's probability to that when sampled counts as."""
    clip_high: Positive = 1.2
    """Of ppo: the most, 1 or more."""
    resume_from: Text | None = None
    """An adapter of this kind in PEFT's format to start from."""
    adapter: _Adapter = "lora"
    """What is trained: LoRA, scaled by the root of the rank (rslora), from principal parts on
    (pissa), with lengths of rows (dora), vectors only (vera), or the model (full)."""
    projection_prng_key: Count = 0
    """Of vera: what its frozen matrices are drawn from, as in PEFT."""
    rank_pattern: _Ranks = field(default_factory=dict)
    """Other ranks of linears that a pattern fits, as in PEFT."""
    alpha_pattern: _Alphas = field(default_factory=dict)
    """Other lora_alpha of linears, alike."""
    offload: Flag = False
    """Of full: keep the optimiser's state in the host's memory, and update there."""

    modules_to_save: _Norms = field(default_factory=tuple)
    """Norms that are trained as they are, named by the end of their path, as in PEFT."""
    bias: Annotated[str, OneOf(BIASES)] = "none"
    """Biases of the base that are trained as they are, as in PEFT: none, all, or those of linears
    with an adapter (lora_only)."""

    @property
    def trains_model(self) -> bool:
        """Whether it trains the model itself, and no adapter."""
        return self.adapter == FULL

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The names of its data sets: one, or several in order."""
        return (self.dataset_name,) if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def trained(self) -> str:
        """What is trained, in a word: an adapter, or the model itself."""
        return "model" if self.adapter == FULL else "adapter"

    @property
    def largest_rank(self) -> int:
        """The largest rank of any of its linears; PiSSA computes with twice as many."""
        return max([self.rank, *self.rank_pattern.values()]) * (1 + (self.adapter == "pissa"))

    @classmethod
    def stranger(cls, name: str) -> tuple[str | None, str]:
        """Return what a field that is none was meant to be, if it is known, and what to say."""
        ours, hint = foreign_field(name) or (None, "")
        return (ours, f": {hint}") if hint else super().stranger(name)

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return values of what only adapters have, where there is none."""
        if given.get("adapter") != FULL:
            return {}
        return {name: OF_ADAPTERS[name] for name in ("rank", "lora_alpha", "target_modules")}

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Mapping[str, Mistake]:
        """Return which fields do not go together."""
        return contradictions(given, cls)
