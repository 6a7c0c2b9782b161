"""One pipeline stage on one rank: transformers' own decoder layers over sharded linears.

The layers are built by transformers from a configuration cut down to this stage, on the meta
device; every linear is then replaced by its shard with adapters, read straight from the
checkpoint. New model families with Llama's module names therefore need no code here.

Shape suffixes: B rows, S their tokens, P tokens to be predicted, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from lobra.common.errors import ConfigError, Problems
from lobra.layout.shapes import ModelShape, layout_problem, read_shape
from lobra.layout.world import shard_range
from lobra.model import packed_attention
from lobra.model.adapter import AdapterSpec
from lobra.model.arranged import Arranged
from lobra.model.checkpoint import EMBEDDING, HEAD, CheckpointReader, as_slice
from lobra.model.embedding import VocabParallelEmbedding
from lobra.model.fused import fuse
from lobra.model.groups import ReplicaGroups
from lobra.model.head import LogitScale, VocabParallelHead
from lobra.model.joint_stack import JointStack
from lobra.model.long_rope import LONG_ROPE, OwnLengthRope
from lobra.model.memory_policy import apply_policy, is_autograds_own
from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.precision import NothingBelowDouble, in_double, kept_dtype
from lobra.model.segment_stack import SegmentStack
from lobra.model.sharded_layer import let_tasks_own_norms, shard_layer
from lobra.model.site import sites_by_input
from lobra.model.slot import Slot
from lobra.model.stack import Stack
from lobra.model.token_tasks import NOBODYS, Selection, TokenTasks

# As transformers names them: what Gemma's embedding, and what Granite's decoder multiplies by.
EMBEDDING_SCALE, INPUT_FACTOR = "scalar_embed_scale", "embedding_multiplier"
# Never used: the base is frozen, and LoRA dropout is the tasks' own.
BASE_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


class Stage(nn.Module):
    """A rank's share of the base model with its adapters.

    While `apart` is set, no task's numbers are in a sum with another's.
    """

    def __init__(
        self,
        shape: ModelShape,
        groups: ReplicaGroups,
        decoder: Any,
        head: VocabParallelHead | None,
        stacks: list[Stack],
        selection: Selection,
        layers: range,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.groups = groups
        self.decoder = decoder
        self.head = head
        self.stacks = stacks
        others = [one for one in decoder.modules() if isinstance(one, Arranged)]
        self.arranged: list[Stack | Arranged] = [*stacks, *others]
        self.selection = selection
        self.slots: dict[int, Slot] = {}
        self.apart = False
        self.layers = layers
        self.loaded_bytes = 0

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the activations, and of the base where it is not quantised."""
        return next(self.decoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Return the device of this stage."""
        return next(self.decoder.parameters()).device

    @property
    def base_bytes(self) -> int:
        """Return the bytes of the frozen base's tensors."""
        modules = [self.decoder, *([] if self.head is None else [self.head])]
        held = [tensor for module in modules for tensor in module.parameters()]
        for stack in self.stacks:
            held += [tensor for base in stack.bases for tensor in base.buffers()]
        storages = [tensor.untyped_storage() for tensor in held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def dropouts(self) -> dict[int, float]:
        """Return the probability of each task's LoRA dropout, by the task's number."""
        return {number: slot.spec.dropout for number, slot in self.slots.items()}

    def install(self, specs: Mapping[int, AdapterSpec]) -> None:
        """Add fresh adapters of tasks, by the tasks' numbers. Those of others stay as they are.

        Raises
        ------
        ConfigError
            If a target module is unknown.
        """
        kept = kept_dtype(self.dtype)
        layers = self.groups.place.adapted_layers(self.shape.num_layers)
        for number, spec in specs_of_model(specs, self.shape).items():
            assert number not in self.slots, "a task's number is its own"
            self.slots[number] = Slot(
                number, spec, self.shape, layers, kept, self.device, self.dtype
            )
        self._arrange()

    def remove(self, number: int) -> None:
        """Drop a task's adapter. Those of others stay as they are."""
        del self.slots[number]
        self._arrange()

    def _arrange(self) -> None:
        self.selection.tasks = NOBODYS  # what stacks worked out for others' slots
        for one in self.arranged:
            one.arrange(self.slots)

    def load(self, number: int, named: Mapping[str, Tensor]) -> None:
        """Take a task's weights over (PEFT's names); KeyError or ValueError if they do not fit."""
        self.slots[number].load(named)
        self.refresh()

    def refresh(self) -> None:
        """Compute with the slots' weights as they are now."""
        for stack in self.stacks:
            stack.refresh()

    @property
    def joins_tasks(self) -> bool:
        """Whether tasks' numbers now meet in sums, so that those of one can spoil another's."""
        return not self.apart and any(isinstance(stack, JointStack) for stack in self.stacks)

    def forget_gradients(self, numbers: Iterable[int]) -> None:
        """Set these slots' gradients to zero."""
        if gradients := [self.slots[number].gradient for number in numbers]:
            torch._foreach_zero_(gradients)

    def hidden(self, batch: MicroBatchTensors, received_BSD: Tensor | None) -> Tensor:
        """Return the hidden states [B, S, D] this stage passes on (normed on the last stage).

        `received_BSD` is the previous stage's output, None on the first stage. No real token sees a
        padded one: in a row of its own padding is on the right, where causal attention does not
        look; packed, it is apart.
        """
        self.selection.tasks = TokenTasks(batch.segments, batch.noise, self.apart)
        if isinstance(self.decoder.rotary_emb, OwnLengthRope):
            self.decoder.rotary_emb.read(batch)
        if received_BSD is None:
            received_BSD = self.decoder.embed_tokens(batch.tokens_BS)
        output = self.decoder(
            inputs_embeds=received_BSD,
            attention_mask=None,
            position_ids=batch.positions_1S,
            use_cache=False,
            packing=batch.packing,
        )
        hidden_BSD: Tensor = output.last_hidden_state
        return hidden_BSD

    def loss(self, hidden_BSD: Tensor, batch: MicroBatchTensors) -> tuple[Tensor, Tensor]:
        """Return (weighted loss, each target's loss [P], detached).

        The weighted loss is the sum of what is learned of the targets' losses, each multiplied by
        its factor, by default its task's weight, and of the losses of examples. Only positions
        whose next token is learned are sent through the head.
        """
        assert self.head is not None, "only the last stage has the head"
        targets = batch.targets
        hidden_PD = hidden_BSD.flatten(0, 1).index_select(0, targets.positions_P)
        factors_P = targets.factors_P
        if factors_P is None:
            factors_P = batch.task_weights.index_select(0, targets.tasks_P)
        noise = None if batch.noise is None else batch.noise.at(targets.positions_P)
        tasks = TokenTasks(targets.segments, noise)
        losses_P = self.head.losses(hidden_PD, targets.tokens_P, tasks)
        # A sum over zero tokens still depends on the hidden states: every rank runs backward.
        weighted = (targets.learned(losses_P) * factors_P).sum()
        if batch.examples is not None:
            weighted = weighted + batch.examples.loss(losses_P)
        if batch.pull is not None:
            weighted = weighted + batch.pull.loss(hidden_BSD)
        return weighted, losses_P.detach()

    def logits(self, batch: MicroBatchTensors, received_BSD: Tensor | None = None) -> Tensor:
        """Return this rank's slice of the logits [B, S, v] (last stage only, no gradient)."""
        assert self.head is not None, "only the last stage has the head"
        with torch.no_grad():
            hidden_BSD = self.hidden(batch, received_BSD)
            return self.head.logits(hidden_BSD, self.selection.tasks)


def build_stage(
    folder: Path,
    groups: ReplicaGroups,
    specs: Mapping[int, AdapterSpec],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    stack_type: type[Stack] | None = None,
    base_precision: str | None = None,
) -> Stage:
    """Build this rank's stage: its layers' shards from a folder, with fresh adapters.

    Parameters
    ----------
    folder
        A Hugging Face model folder with safetensors weights.
    groups
        This rank's place and process groups; the memory policy is its layout's.
    specs
        The tasks' adapters, by the tasks' numbers.
    dtype
        Of the activations, and of what of the base is not quantised; adapters are fp32, in fp64
        fp64.
    device
        Where everything lives.
    stack_type
        How adapters are computed; by default what is faster on the device.
    base_precision
        What linears are kept in, one of `QUANTISED`; None: as the folder has them, in ``dtype``.

    Raises
    ------
    ConfigError
        If the model cannot be run under this layout, or a target module is unknown.
    """
    layout = groups.place.layout
    shape = read_shape(folder).kept_in(base_precision)
    problem = layout_problem(shape, layout.tp, layout.pp)
    if problem:
        raise ConfigError(f"{folder}: {problem}")
    specs = specs_of_model(specs, shape)
    device = torch.device(device)
    layers = groups.place.layers(shape.num_layers)
    reader = CheckpointReader(folder, dtype, device)
    config = _stage_config(folder, layers)
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    selection = Selection()
    stack_type = stack_type or (JointStack if device.type == "cuda" else SegmentStack)
    stacks: list[Stack] = []
    for local, layer in enumerate(layers):
        stacks += shard_layer(
            decoder.layers[local], layer, shape, groups, reader, stack_type, selection
        )
    head = _place_ends(decoder, shape, groups, reader, selection)
    if head is not None:
        (site,) = next(sites_by_input(shape, shape.num_layers))
        stacks.append(head.adapted(site, selection))
    _load_rest(decoder, layers, reader)
    # Non-persistent buffers were made on the meta device: build the module anew where it runs.
    with NothingBelowDouble() if dtype == torch.float64 else nullcontext():
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    if getattr(decoder.rotary_emb, "rope_type", None) == LONG_ROPE:
        decoder.rotary_emb = OwnLengthRope(decoder.rotary_emb)
    decoder.requires_grad_(False)
    is_fused = fuse(decoder)
    for stack in stacks:
        stack.fuses_dropout = is_fused
    let_tasks_own_norms(decoder, layers, groups, selection)
    if dtype == torch.float64:
        for module in (*decoder.layers, decoder.norm, decoder.rotary_emb):
            in_double(module)
    if not is_autograds_own(layout.memory, device):
        apply_policy(decoder.layers, layout.memory)  # the last: also what is above is run again
    stage = Stage(shape, groups, decoder, head, stacks, selection, layers)
    stage.loaded_bytes = reader.loaded_bytes
    stage.install(specs)
    return stage


def specs_of_model(specs: Mapping[int, AdapterSpec], shape: ModelShape) -> dict[int, AdapterSpec]:
    """Return adapters whose target modules are the model's own linears.

    Raises
    ------
    ConfigError
        For targets that it has not.
    """
    problems, own = Problems(), {}
    for number, spec in specs.items():
        try:
            own[number] = replace(spec, target_modules=shape.own_modules(spec.target_modules))
        except ConfigError as error:
            problems += error.problems.prefixed(f"task {spec.name}: ")
    problems.raise_if_any()
    return own


def _stage_config(folder: Path, layers: range) -> Any:
    """Return the model's configuration cut down to this stage's layers."""
    config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers.start : layers.stop]
    config.num_hidden_layers = len(layers)
    config._attn_implementation = packed_attention.register()
    config.use_cache = False
    for name in BASE_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def _place_ends(
    decoder: Any,
    shape: ModelShape,
    groups: ReplicaGroups,
    reader: CheckpointReader,
    selection: Selection,
) -> VocabParallelHead | None:
    """Load the embedding on the first stage, norm and head on the last; drop them elsewhere."""
    place = groups.place
    rows = shard_range(shape.vocab_size, place.layout.tp, place.tp_index)
    scale = getattr(decoder.embed_tokens, EMBEDDING_SCALE, None)
    padding = decoder.embed_tokens.padding_idx
    decoder.embed_tokens = None
    weight_vD = None
    if hasattr(decoder, INPUT_FACTOR) and not place.is_first_stage:
        setattr(decoder, INPUT_FACTOR, 1.0)
    if place.is_first_stage:
        weight_vD = reader.read(EMBEDDING, as_slice(rows))
        decoder.embed_tokens = VocabParallelEmbedding(
            weight_vD, rows, groups.tp_group, selection, scale, padding
        )
    if not place.is_last_stage:
        decoder.norm = nn.Identity()
        return None
    if not shape.tied_embeddings:
        weight_vD = reader.read(HEAD, as_slice(rows))
    elif weight_vD is None:
        weight_vD = reader.read(EMBEDDING, as_slice(rows))
    largest_slice = math.ceil(shape.vocab_size / place.layout.tp)
    config = decoder.config
    scale = LogitScale(
        getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)
    )
    return VocabParallelHead(weight_vD, rows, groups.tp_group, largest_slice, scale)


def _load_rest(decoder: nn.Module, layers: range, reader: CheckpointReader) -> None:
    """Load every parameter that is still on the meta device (norms), whole."""
    for name, parameter in list(decoder.named_parameters()):
        if parameter.device.type != "meta":
            continue
        checkpoint_name = name
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(layers[int(parts[1])])
            checkpoint_name = ".".join(parts)
        parent = decoder.get_submodule(name.rpartition(".")[0])
        value = reader.read(f"model.{checkpoint_name}")
        setattr(parent, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
