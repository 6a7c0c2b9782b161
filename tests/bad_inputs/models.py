"""Base models and adapters to start from."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file, save

from tests.assets.golden import HERE as GOLDEN
from tests.bad_inputs.case import Case, task_file

CONFIG = json.loads((GOLDEN / "base/config.json").read_text())
_TOKENIZER = json.loads((GOLDEN / "base/tokenizer_config.json").read_text())
ADAPTER = json.loads((GOLDEN / "start/few/adapter_config.json").read_text())
WRONG: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2", 7, None),
    "num_hidden_layers": (0, -1, "4", 10**9, 1.5, True),
    "hidden_size": (0, "x", 10**12, [64]),
    "intermediate_size": (0, 10**12),
    "num_attention_heads": (0, "x", 10**9),
    "num_key_value_heads": (-1, "x", 7),
    "vocab_size": (0, "x", 10**12),
    "head_dim": ("x", -8, 10**12),
    "tie_word_embeddings": ("no", 7),
    "max_position_embeddings": ("x", -1, 10**30),
    "quantization_config": ({"quant_method": "fp8"}, {"quant_method": "bitsandbytes"}, 4),
    "hidden_act": ("no such function", 7),
    "rope_scaling": ({"rope_type": "dynamic", "factor": 2.0},),
    "rope_parameters": (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}, {"rope_type": "no such kind"},
        {"type": "longrope"}, {"rope_type": 7}, "x", {"rope_type": "default", "rope_theta": 0},
    ),
    "rms_norm_eps": (1e308, "small", float("nan")),
}  # fmt: skip
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not valid JSON"),
    "list": ("[1]", "want an object"),
    "latin": (b'{"a": "\xe9"}', "not UTF-8"),
    "digits": ('{"hidden_size": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
    "deep": ('{"a": ' + "[" * 100_000, "nested too deeply"),
    "twice": ('{"hidden_size": 1, "hidden_size": 2}', "is given twice"),
}
INDICES: dict[str, tuple[Any, str]] = {
    "no-map": ({}, "weight_map"),
    "list": ([1], "weight_map"),
    "map-list": ({"weight_map": [1]}, "weight_map"),
    "map-numbers": ({"weight_map": {"a": 7}}, "weight_map"),
    "outside": ({"weight_map": {"a": "../other.safetensors"}}, "beside it"),
    "missing": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: named in"),
    "cut": ("{", "not valid JSON"),
}
#: Of the tokenizer's configuration, fields; and of the tokenizer, texts.
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "template": ({"chat_template": "{% for"}, "chat template does not take this conversation"),
    "template-number": ({"chat_template": 7}, "chat_template = 7: want a text"),
    "template-list": ({"chat_template": [1]}, "the tokenizer cannot be read"),
    "template-endless": (
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "Range too big",
    ),
    "template-reads-files": ({"chat_template": "{% include '/etc/passwd' %}"}, "no loader"),
    "template-of-nothing": ({"chat_template": "{{ nothing.here }}"}, "'nothing' is undefined"),
    "end": ({"eos_token": 7}, "the tokenizer cannot be read"),
    "added": ({"added_tokens_decoder": {"a": 7}}, "the tokenizer cannot be read"),
    "empty": ("", "the tokenizer cannot be read"),
    "list": ("[1]", "the tokenizer cannot be read"),
    "latin": (b'{"a": "\xe9"}', "the tokenizer cannot be read"),
    "object": ("{}", "the tokenizer cannot be read"),
    "deep": ("[" * 100_000, "the tokenizer cannot be read"),
}  # fmt: skip
ADAPTERS: dict[str, tuple[Any, str]] = {
    "list": ([1], "want an object"),
    "cut": ("{", "not readable"),
    "rank": (ADAPTER | {"r": 4}, "r is 4, the task says 2"),
    "dora": (ADAPTER | {"use_dora": True}, "use_dora"),
    "stranger": (ADAPTER | {"new_kind": "x"}, "new_kind"),
    "latin": (b'{"r": "\xe9"}', "not readable"),
    "patterns": (ADAPTER | {"rank_pattern": 7}, "want an object of positive numbers"),
    "pattern": (ADAPTER | {"alpha_pattern": {"(": 2}}, "is no regular expression"),
    "endless": (ADAPTER | {"rank_pattern": {"(.*)*(.*)*x": 2}}, "may take for ever to match"),
}


@cache
def weights(name: str, rows: int | None = None, value: float | None = None) -> bytes:
    """Return the model's weights with fewer rows of a tensor, or a value in its last place."""
    tensors = load_file(GOLDEN / "base/model.safetensors")
    if rows is not None:
        tensors[name] = tensors[name][:rows].contiguous()
    elif value is not None:
        tensors[name].view(-1)[-1] = value
    else:
        del tensors[name]
    return save(tensors, metadata={"format": "pt"})


def adapter(value: float = 0.0, dtype: torch.dtype = torch.float32) -> bytes:
    """Return an adapter's weights of a dtype, with a value in them."""
    tensors = load_file(GOLDEN / "start/few/adapter_model.safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    torch.nn.init.constant_(next(iter(tensors.values())), value)
    return save(tensors, metadata={"format": "pt"})


def _cases() -> dict[str, Case]:
    cases = {}
    path = "base/config.json"
    for field, values in WRONG.items():
        for number, value in enumerate(values):
            content = json.dumps(CONFIG | {field: value})
            cases[f"{field}-{number}"] = Case((path,), {path: content})
    for name, (text, says) in TEXTS.items():
        cases[name] = Case((path, says), {path: text})
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name, (entry, says) in TOKENIZERS.items():
        is_field = isinstance(entry, dict)
        path = "base/tokenizer_config.json" if is_field else "base/tokenizer.json"
        cases[f"tokenizer-{name}"] = Case(
            ("task[1].dataset_name = 'short'", says),
            {path: _TOKENIZER | entry if is_field else entry, "data/short.jsonl": chat},
        )
    index = "base/model.safetensors.index.json"
    for name, (entry, says) in INDICES.items():
        cases[f"index-{name}"] = Case(("base/", says), {index: entry})
    for name, (entry, says) in ADAPTERS.items():
        cases[f"adapter-{name}"] = Case(
            ("tasks.json: task[1].resume_from", "start/few", says),
            {
                "start/few/adapter_config.json": entry,
                "tasks.json": task_file(resume_from="start/few"),
            },
        )
    return cases


_WEIGHTS = "base/model.safetensors"
_NORM, _LAYER = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
CASES = _cases() | {
    "weights-empty": Case(("model.safetensors", "not a usable safetensors"), {_WEIGHTS: b""}),
    "weights-cut": Case(("model.safetensors",), {_WEIGHTS: weights(_NORM)[:5000]}),
    "weights-header": Case(("model.safetensors",), {_WEIGHTS: b"\xff" * 64}),
    "weights-pickle": Case(("model.safetensors",), {_WEIGHTS: b"\x80\x04\x95."}),
    "weights-pipe": Case(("model.safetensors",), {_WEIGHTS: None}),
    "weights-lack-one": Case((f"no tensor '{_NORM}'",), {_WEIGHTS: weights(_NORM)}),
    "weights-lack-a-layer-s": Case((f"no tensor '{_LAYER}'",), {_WEIGHTS: weights(_LAYER)}),
    "weights-norm-of-another-size": Case(
        (f"tensor '{_NORM}' is (8,)", "config.json implies"), {_WEIGHTS: weights(_NORM, rows=8)}
    ),
    "weights-nan": Case(
        (f"tensor '{_LAYER}' holds values that are not finite", "get the model's weights anew"),
        {_WEIGHTS: weights(_LAYER, value=float("nan"))},
    ),
    "weights-infinite": Case(
        (f"tensor '{_NORM}' holds values that are not finite",),
        {_WEIGHTS: weights(_NORM, value=float("inf"))},
    ),
    "fewer-layers-than-weights": Case(
        ("layers up to", "num_hidden_layers 1", "correct one"),
        {"base/config.json": json.dumps(CONFIG | {"num_hidden_layers": 1})},
    ),
    "more-layers-than-weights": Case(
        ("has no tensor",), {"base/config.json": json.dumps(CONFIG | {"num_hidden_layers": 900})}
    ),
    "nowhere": Case(("model 'none'", "give"), None, ("--model", "none")),
    "long-name": Case(("model 'xxx",), None, ("--model", "x" * 5000)),
    "adapter-nan": Case(
        ("task[1].resume_from", "not finite"),
        {
            "start/few/adapter_model.safetensors": adapter(float("nan")),
            "tasks.json": task_file(resume_from="start/few"),
        },
    ),
    "adapter-of-whole-numbers": Case(
        ("task[1].resume_from", "is stored as I32, want one of F64"),
        {
            "start/few/adapter_model.safetensors": adapter(dtype=torch.int32),
            "tasks.json": task_file(resume_from="start/few"),
        },
    ),
    "adapter-cut": Case(
        ("task[1].resume_from", "not readable"),
        {
            "start/few/adapter_model.safetensors": b"\x00" * 9,
            "tasks.json": task_file(resume_from="start/few"),
        },
    ),
    "adapter-nowhere": Case(
        ("task[1].resume_from", "not found"), {"tasks.json": task_file(resume_from="none")}
    ),
    "adapter-long-name": Case(
        ("task[1].resume_from", "not found"), {"tasks.json": task_file(resume_from="x" * 5000)}
    ),
}
