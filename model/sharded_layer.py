"""A decoder layer of transformers, its linears replaced by this rank's shards with adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from lobra.layout.shapes import ModelShape, module_path
from lobra.layout.world import kv_head_range, shard_range
from lobra.model.adapter import SHARED_INPUTS, Site
from lobra.model.base_linear import DenseLinear, Shard
from lobra.model.checkpoint import CheckpointReader
from lobra.model.groups import ReplicaGroups
from lobra.model.stack import AdaptedLinear, Stack
from lobra.model.tensor_parallel import copy_to_group
from lobra.model.token_tasks import Selection

ROW_PARALLEL = ("o_proj", "down_proj")


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
    sizes = shape.linear_sizes()
    stacks = []
    for modules in SHARED_INPUTS:
        paths = [module_path(module) for module in modules]
        own = [shards[module] for module in modules]
        has_bias = [layer_module.get_submodule(path).bias is not None for path in paths]
        summed = own[0].is_row_parallel
        names = [f"model.layers.{layer}.{path}" for path in paths]
        bases = [
            DenseLinear.read(reader, name, shard, bias and not summed)
            for name, shard, bias in zip(names, own, has_bias, strict=True)
        ]
        sites = [Site(layer, module, *sizes[module]) for module in modules]
        group = groups.tp_group if summed else None
        stack = stack_type(sites, own, bases, selection, reader.dtype, reader.device, group)
        for linear, path in enumerate(paths):
            bias_O = reader.read(f"{names[linear]}.bias") if has_bias[linear] and summed else None
            layer_module.set_submodule(path, AdaptedLinear(stack, linear, group, bias_O))
        stacks.append(stack)
    if groups.tp_group is not None:
        for parent in (layer_module.self_attn, layer_module.mlp):
            _sum_input_gradient(parent, groups)
    attention = layer_module.self_attn
    local_queries = len(shards["q_proj"].outputs) // shape.head_dim
    local_keys = len(shards["k_proj"].outputs) // shape.head_dim
    attention.num_key_value_groups = local_queries // local_keys
    return stacks


def _sum_input_gradient(parent: nn.Module, groups: ReplicaGroups) -> None:
    """Sum the input's gradient over the TP group once for all column-parallel linears below."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (copy_to_group(args[0], groups.tp_group), *args[1:]), kwargs
        hidden = copy_to_group(kwargs["hidden_states"], groups.tp_group)
        return args, {**kwargs, "hidden_states": hidden}

    parent.register_forward_pre_hook(hook, with_kwargs=True)
