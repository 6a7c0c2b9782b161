"""A decoder layer of transformers, its linears replaced by this rank's shards with adapters."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lobra.layout.shapes import FusedLinear, ModelShape, module_path
from lobra.layout.world import kv_head_range, shard_range
from lobra.model.adapted_linear import AdaptedLinear
from lobra.model.base_linear import Shard
from lobra.model.checkpoint import CheckpointReader, as_slice
from lobra.model.groups import ReplicaGroups
from lobra.model.own_vector import OwnNorm, OwnVector
from lobra.model.quantised_linear import read_linear
from lobra.model.site import sites_by_input
from lobra.model.stack import Stack
from lobra.model.tensor_parallel import SharedNorm, copy_to_group
from lobra.model.token_tasks import Selection

ROW_PARALLEL = ("o_proj", "down_proj")
#: Families whose norms of queries and keys are of [B, heads, S, ...], after they were transposed.
HEADS_FIRST = ("gemma3_text",)


def linear_shards(shape: ModelShape, tp_size: int, tp_index: int) -> dict[str, Shard]:
    """Return this rank's shard of each linear: heads and ffn columns split, o and down by rows."""
    queries = shard_range(shape.num_heads, tp_size, tp_index)
    keys = kv_head_range(shape.num_kv_heads, tp_size, tp_index)
    ffn = shard_range(shape.intermediate_size, tp_size, tp_index)
    scale = shape.head_dim
    query_columns = range(queries.start * scale, queries.stop * scale)
    key_columns = range(keys.start * scale, keys.stop * scale)
    split = {"q_proj": query_columns, "k_proj": key_columns, "v_proj": key_columns}
    split |= {"gate_proj": ffn, "up_proj": ffn, "o_proj": query_columns, "down_proj": ffn}
    for name, fused in shape.fused_linears().items():
        groups = shard_range(fused.groups, tp_size, tp_index)
        split[name] = range(groups.start * fused.group_width, groups.stop * fused.group_width)
    shards = {}
    for module, (inputs, outputs) in shape.linear_sizes().items():
        if module in ROW_PARALLEL:
            shards[module] = Shard(split[module], range(outputs), inputs, outputs)
        else:
            shards[module] = Shard(range(inputs), split[module], inputs, outputs)
    return shards


def shard_layer(
    layer_module: Any,
    layer: int,
    shape: ModelShape,
    groups: ReplicaGroups,
    reader: CheckpointReader,
    stack_type: type[Stack],
    selection: Selection,
) -> list[Stack]:
    """Replace the layer's linears by shards with stacks, which are returned; adjust head counts."""
    place = groups.place
    shards = linear_shards(shape, place.layout.tp, place.tp_index)
    stacks = []
    for sites in sites_by_input(shape, layer):
        own = [shards[site.module] for site in sites]
        summed = own[0].is_row_parallel
        bases, biases, own_biases = [], [], []
        group = groups.tp_group if summed else None
        for site, shard in zip(sites, own, strict=True):
            path = module_path(site.module)
            name = f"model.layers.{layer}.{path}"
            has_bias = layer_module.get_submodule(path).bias is not None
            assert not (has_bias and site.fused), "no family has a fused linear with a bias"
            bias = reader.read(f"{name}.bias", as_slice(shard.outputs)) if has_bias else None
            biases.append(bias if summed else None)
            copies, features = (place.layout.tp, None) if summed else (1, shard.outputs)
            own_bias = OwnVector(f"{name}.bias", selection, features, copies) if has_bias else None
            own_biases.append(own_bias)
            of_base = None if summed else bias
            bases.append(read_linear(reader, name, shard, shape.quantised, site.fused, of_base))
        stack = stack_type(sites, own, bases, selection, reader.dtype, reader.device, group)
        for linear, site in enumerate(sites):
            module: nn.Module = AdaptedLinear(
                stack, linear, group, biases[linear], own_biases[linear]
            )
            if site.fused:
                module = PartByPart(module, site.fused)
            layer_module.set_submodule(module_path(site.module), module)
        stacks.append(stack)
    if groups.tp_group is not None:
        _share_wide_norms(layer_module.self_attn, layer, shards, groups, reader)
        for parent in (layer_module.self_attn, layer_module.mlp):
            _sum_input_gradient(parent, groups)
    attention = layer_module.self_attn
    queries = len(shards["o_proj"].inputs) // shape.head_dim
    keys = len(kv_head_range(shape.num_kv_heads, place.layout.tp, place.tp_index))
    attention.num_key_value_groups = queries // keys
    if "qkv_proj" in shape.fused:  # which is cut into queries, keys and values by these
        attention.config = copy(attention.config)
        attention.config.num_attention_heads = queries
        attention.num_key_value_heads = keys
    return stacks


class PartByPart(nn.Module):
    """A fused linear whose output features lie part by part again, as its layer cuts them."""

    def __init__(self, linear: nn.Module, fused: FusedLinear) -> None:
        super().__init__()
        self.linear = linear
        self.widths = fused.widths

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., o] of x [..., i]."""
        groups = self.linear(x).unflatten(-1, (-1, sum(self.widths)))
        return torch.cat([part.flatten(-2) for part in groups.split(self.widths, dim=-1)], dim=-1)


def _share_wide_norms(
    attention: Any,
    layer: int,
    shards: dict[str, Shard],
    groups: ReplicaGroups,
    reader: CheckpointReader,
) -> None:
    """Replace norms over all heads' features together (OLMo 2) by what this rank has of them."""
    for name, module in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
        norm, shard = getattr(attention, name, None), shards.get(module)
        if norm is None or shard is None or len(norm.weight) != shard.out_features:
            continue
        weight_f = reader.read(
            f"model.layers.{layer}.self_attn.{name}.weight", as_slice(shard.outputs)
        )
        shared = SharedNorm(weight_f, shard.outputs, norm.variance_epsilon, groups.tp_group, name)
        setattr(attention, name, shared)


def let_tasks_own_norms(
    decoder: Any, layers: range, groups: ReplicaGroups, selection: Selection
) -> None:
    """Wrap every norm of a stage, so that tasks may have weights of their own.

    What the norms of queries and keys are of is split over the tensor-parallel group; what the
    others are of, every rank has whole.
    """
    tp = groups.place.layout.tp
    heads_first = decoder.config.model_type in HEADS_FIRST
    for local, layer in enumerate(layers):
        for path, norm in list(decoder.layers[local].named_modules()):
            if not type(norm).__name__.endswith("Norm"):
                continue
            is_split = path.startswith("self_attn.")
            own_weight = OwnVector(
                f"model.layers.{layer}.{path}.weight",
                selection,
                getattr(norm, "features", None),
                1 if is_split else tp,
            )
            wrapped = OwnNorm(norm, own_weight, heads_first and is_split)
            decoder.layers[local].set_submodule(path, wrapped)
    if groups.place.is_last_stage:
        own_weight = OwnVector("model.norm.weight", selection, num_copies=tp)
        decoder.norm = OwnNorm(decoder.norm, own_weight)


def _sum_input_gradient(parent: nn.Module, groups: ReplicaGroups) -> None:
    """Sum the input's gradient over the TP group once for all column-parallel linears below."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (copy_to_group(args[0], groups.tp_group), *args[1:]), kwargs
        hidden = copy_to_group(kwargs["hidden_states"], groups.tp_group)
        return args, {**kwargs, "hidden_states": hidden}

    parent.register_forward_pre_hook(hook, with_kwargs=True)
