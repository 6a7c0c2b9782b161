"""Fields of a task that do not go together, each with what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lobra.common.models import Mistake
from lobra.tasks.foreign_names import foreign_field
from lobra.tasks.kinds import FULL, OF_ADAPTERS, OF_OPTIMIZER, OPTIMIZERS
from lobra.tasks.objectives import KTO, OBJECTIVES, PARAMETERS, PPO, SUPERVISED
from lobra.tasks.target_modules import EMBEDDING

Fields = Mapping[str, Any]


def contradictions(given: Fields, defaults: Any) -> dict[str, Mistake]:
    """Return what is wrong with the fields of a task beside each other.

    Parameters
    ----------
    given
        The fields as a file has them, unchecked.
    defaults
        The class that has the values of those that are not given.
    """
    mistakes = _optimizer_mistakes(given, defaults)
    mistakes |= _adapter_mistakes(given)
    mistakes |= _objective_mistakes(given, defaults)
    mistakes |= _model_mistakes(given)
    steps, warmup = given.get("steps"), given.get("warmup_steps")
    if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps > 0:
        mistakes["warmup_steps"] = Mistake(f"want at most the task's steps, {steps}", warmup)
    meant = {found[0] for name in given if (found := foreign_field(name))}
    if not {"steps", "epochs"} & (given.keys() | meant):
        mistakes["steps"] = Mistake("neither steps nor epochs is given, want at least one")
    return mistakes


def _optimizer_mistakes(given: Fields, defaults: Any) -> dict[str, Mistake]:
    """Return which fields are another optimiser's, and a decay that is too large."""
    optimizer = given.get("optimizer", OPTIMIZERS[0])
    mistakes = {
        name: Mistake(f"is of {' and '.join(owners)}, the task's is {optimizer}", given[name])
        for name, owners in OF_OPTIMIZER.items()
        if given.get(name, getattr(defaults, name)) != getattr(defaults, name)
        and optimizer in OPTIMIZERS
        and optimizer not in owners
    }
    rate = given.get("learning_rate", defaults.learning_rate)
    decay = given.get("weight_decay")
    if _is_number(rate) and type(decay) in (int, float) and decay > 1 / rate:
        text = f"want at most 1 / learning_rate, {1 / rate:g}: a step would turn every weight over"
        mistakes["weight_decay"] = Mistake(text, decay)
    return mistakes


def _adapter_mistakes(given: Fields) -> dict[str, Mistake]:
    """Return what is wrong with fields that not every kind of adapter has."""
    kind = given.get("adapter", "lora")
    mistakes: dict[str, Mistake] = {}
    if kind == "vera":
        mistakes |= {
            name: Mistake("vera has one rank for all linears and no scale", given[name])
            for name in ("rank_pattern", "alpha_pattern")
            if given.get(name)
        }
    if kind == "pissa" and "resume_from" in given:
        text = (
            "pissa starts from the base's principal parts; go on from an exported one as plain "
            "LoRA, with adapter: lora and twice the rank and lora_alpha"
        )
        mistakes["resume_from"] = Mistake(text, given["resume_from"])
    trains_biases = given.get("bias", "none") != "none"
    if trains_biases and kind == "vera":
        mistakes["bias"] = Mistake("vera trains vectors of its own only", given["bias"])
    if given.get("loraplus_ratio", 1.0) != 1.0:
        targets = given.get("target_modules")
        targets = [targets] if isinstance(targets, str) else targets
        if trains_biases or (isinstance(targets, list | tuple) and EMBEDDING in targets):
            text = f"LoRA+ has other rates for biases and {EMBEDDING}: train them without it"
            mistakes["loraplus_ratio"] = Mistake(text, given["loraplus_ratio"])
    return mistakes


def _objective_mistakes(given: Fields, defaults: Any) -> dict[str, Mistake]:
    """Return what is wrong with the fields that only some objectives have."""
    objective = given.get("objective", SUPERVISED)
    if objective not in OBJECTIVES:
        return {}
    own = PARAMETERS[objective]
    high = given.get("clip_high", 1)
    if objective == PPO and _is_number(high) and high < 1:
        return {"clip_high": Mistake("want a number of 1 or more", high)}
    foreign = {name for names in PARAMETERS.values() for name in names} - {*own}
    if objective != SUPERVISED:
        foreign.add("train_on_inputs")
    return {
        name: Mistake(f"objective {objective} has no such field: remove it", given[name])
        for name in sorted(foreign & given.keys())
        if given[name] not in (None, getattr(defaults, name))
    }


def _model_mistakes(given: Fields) -> dict[str, Mistake]:
    """Return what is wrong with the fields of a task that trains the model itself."""
    if given.get("adapter") != FULL:
        text = "only adapter: full has it: remove it"
        return {"offload": Mistake(text, True)} if given.get("offload") is True else {}
    mistakes = {
        name: Mistake("adapter: full trains no adapter: remove it", given[name])
        for name, nothing in OF_ADAPTERS.items()
        if given.get(name, nothing) != nothing
    }
    if given.get("early_stopping_patience"):
        text = "adapter: full keeps no model but the last: remove it"
        mistakes["early_stopping_patience"] = Mistake(text, given["early_stopping_patience"])
    if given.get("objective") in ("dpo", KTO):
        text = "adapter: full changes the model that answers would be compared with: want another"
        mistakes["objective"] = Mistake(text, given["objective"])
    return mistakes


def _is_number(value: Any) -> bool:
    """Return whether a value is a positive number that arithmetic takes."""
    return type(value) in (int, float) and 0 < value < 1e100
