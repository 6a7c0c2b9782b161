"""The closed list of a row's fields: which change training and are not obeyed by every format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lobra.common.errors import show

#: Names of the three fields of an instruction row in published data sets, the usual name first.
INSTRUCTION = ("instruction", "question", "query", "problem", "prompt")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "completion", "solution", "answer")

#: Masks that say of every token whether it is learned.
MASKS = ("completion_mask", "assistant_masks", "loss_mask")
TOKEN_FIELDS = ("input_ids", "labels", "attention_mask", "position_ids", *MASKS)
#: What was sampled, and how good it was.
ROLLOUT_FIELDS = ("prompt_ids", "completion_ids", "logprobs", "advantages")

#: Columns that hold a row of another format.
CONTENTS = ("messages", "conversations", "conversation", "input_ids")

_CHAT = "set the task's prompt to chat, which has a place for it, or remove it"
_TEXTS_ONLY = "only texts are trained: remove it"
_PREFERENCES = (
    "preference data are for the objectives dpo, cpo, orpo (chosen and rejected) and kto (label): "
    "set the task's objective, or give one answer a row"
)
_ROLLOUTS = "rows of sampled tokens are for the objective ppo: set the task's objective"
_TOKENS = "goes with input_ids only: remove it, or give the row as input_ids"

#: Fields that change training, with the remedy where a format does not obey them.
REFUSED: Mapping[str, str] = {
    "system": _CHAT,
    "system_prompt": _CHAT,
    "system_message": _CHAT,
    "history": "goes with instruction and output, and with the task's prompt set to chat",
    "tools": "goes with messages: write the row as a conversation",
    "documents": "goes with messages: write the row as a conversation",
    "chat_template_kwargs": "goes with messages: write the row as a conversation",
    "functions": "write them as tools: [{'type': 'function', 'function': {..}}]",
    "function_call": "write the call as an assistant message with tool_calls",
    "chosen": _PREFERENCES,
    "rejected": _PREFERENCES,
    "chosen_response": _PREFERENCES,
    "rejected_response": _PREFERENCES,
    "completion_ids": _ROLLOUTS,
    "advantages": _ROLLOUTS,
    "images": _TEXTS_ONLY,
    "image": _TEXTS_ONLY,
    "videos": _TEXTS_ONLY,
    "video": _TEXTS_ONLY,
    "audios": _TEXTS_ONLY,
    "audio": _TEXTS_ONLY,
    "labels": _TOKENS,
    "position_ids": _TOKENS,
    **dict.fromkeys(MASKS, _TOKENS),
    **dict.fromkeys(CONTENTS, "the first row says that rows are of another format; keep one"),
    "prompt_mask": "say what is learned by labels or completion_mask",
    "label_ids": "say what is learned by labels",
    "target_ids": "say what is learned by labels",
    "loss_weights": "tokens are learned or not: say which by labels or completion_mask",
    "token_weights": "tokens are learned or not: say which by labels or completion_mask",
    "enable_thinking": "give it in chat_template_kwargs",
    "token_type_ids": "the model has no token types: remove it",
    "seq_lengths": "packed rows are not read: give one sequence a row",
    "cu_seqlens": "packed rows are not read: give one sequence a row",
    "weight": "rows have no weights: repeat a row, or mark messages with weight 0 or 1",
    "sample_weight": "rows have no weights: repeat a row, or leave it out",
    "loss_weight": "rows have no weights: repeat a row, or leave it out",
    "train": "leave rows out that are not to be trained on",
}


def refused_fields(row: Mapping[str, Any], obeyed: Collection[str], kind: str) -> list[str]:
    """Return what is wrong with the fields of a row that its format does not obey.

    A field that is null, empty or says what holds anyway (a weight of 1, token types that are all
    0) changes nothing and is not refused.
    """
    problems = _alternatives(row, obeyed, kind)
    for name in row.keys() & REFUSED.keys():
        value = row[name]
        if name in obeyed or _says_nothing(name, value):
            continue
        problems.append(f"{name} = {show(value)}: {REFUSED[name]}")
    if kind == "completion" and isinstance(row.get("label"), bool):
        problems.append(f"label = {show(row['label'])}: {_PREFERENCES}")
    return sorted(problems)


def _alternatives(row: Mapping[str, Any], obeyed: Collection[str], kind: str) -> list[str]:
    """Return what is wrong where a row has two fields for one thing.

    A ``prompt`` beside an instruction is its rendered form in published data, and of ``solution``
    and ``answer`` the first is learned (docs/data.md): these are no mistake.
    """
    if kind == "completion":
        extra = [name for name in INPUT if row.get(name)]
        return [
            f"{name} = {show(row[name])}: rows of prompt and completion have none" for name in extra
        ]
    problems = []
    if kind in ("instruction", "chat"):
        for names in (INSTRUCTION[:-1], INPUT, OUTPUT[:-2]):
            given = [name for name in names if row.get(name)]
            if len(given) > 1 and any(name in obeyed for name in given):
                problems.append(f"{' and '.join(given)}: mean the same here, keep one")
    return problems


def _says_nothing(name: str, value: Any) -> bool:
    if value is None or value in ("", [], {}):
        return True
    if name in ("weight", "sample_weight", "loss_weight", "train"):
        return bool(value == 1)
    if name == "token_type_ids":
        return isinstance(value, list) and not any(value)
    return False
