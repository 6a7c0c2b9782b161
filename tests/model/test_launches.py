"""What a layer's forward and backward pass launch on a GPU, counted on tensors without values.

Where nothing has a value, whatever would have the host wait for one fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.layout.world import one_replica
from lobra.model import packed_attention
from lobra.model.adapter import AdapterSpec
from lobra.model.compiled import compiled
from lobra.model.dropout import TokenNoise
from lobra.model.fused import fuse_modules
from lobra.model.groups import ReplicaGroups
from lobra.model.joint_stack import JointStack
from lobra.model.memory_policy import apply_policy
from lobra.model.packed_attention import Packing, register
from lobra.model.stage import Stage, build_stage
from lobra.model.token_tasks import Segment, TokenTasks
from tests.model.support import save_llama

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH = 6
# Of a layer of Llama, forward and backward, by memory policy (None: autograd's own). What a policy
# computes again it launches again: two norms, rotary embedding, silu x up and two sums (keep); two
# products with their updates (lean); four more with theirs, attention, four x A^T and their masks.
MOST_LAUNCHES = {None: 75, "keep": 75 + 6, "lean": 75 + 6 + 4, "full": 75 + 6 + 4 + 8 + 1 + 8}
# With dropout each of seven linears has an input of its own, which is drawn twice: two launches
# forward and four backward, where a stack of one or several linears has one and two.
MORE_WITH_DROPOUT = 7 * 6 - 4 * 3
MORE_IN_FULL = 7 * 2 - 4


class Launches(TorchDispatchMode):
    """Counts the operations that are neither views nor mere memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.inside_one = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        is_view = bool(returns) and all(x.alias_info and not x.alias_info.is_write for x in returns)
        if not (self.inside_one or is_view or "empty" in name or name == "_unsafe_view"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Count what runs inside as one launch."""
        assert not self.inside_one
        self.names[name] += 1
        self.inside_one = True
        try:
            yield
        finally:
            self.inside_one = False


class OneKernel(torch.autograd.Function):
    """Stands for a compiled function: one launch forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any, launches: Launches, name: str, function: Callable[..., Any], *args: Any
    ) -> Any:
        ctx.launches, ctx.name, ctx.function = launches, name, function
        ctx.given = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(x for x in args if isinstance(x, Tensor)))
        with launches.as_one(name):
            return function(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        with ctx.launches.as_one(f"{ctx.name} backward"), torch.enable_grad():
            args = [
                next(tensors).detach().requires_grad_(needed) if given is None else given
                for given, needed in zip(ctx.given, ctx.needs_input_grad[3:], strict=True)
            ]
            wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
            outputs = ctx.function(*args)
            found = iter(torch.autograd.grad(outputs, wanted, gradients))
        return (
            None,
            None,
            None,
            *(next(found) if needed else None for needed in ctx.needs_input_grad[3:]),
        )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Return a count of launches, in which every compiled function is one."""
    counting = Launches()

    def counted(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def one_kernel(*args: Any, **options: Any) -> Any:
            called = partial(function, **options)
            return OneKernel.apply(counting, function.__qualname__, called, *args)

        return one_kernel

    compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(packed_attention, "_is_fast", lambda query: True)
    yield counting
    compiled.cache_clear()


def stage_without_values(
    folder: Path, policy: str | None, num_tasks: int, dropout: float = 0.0
) -> Stage:
    """Return a fused bf16 stage as on a GPU, of tensors that have no values."""
    place = one_replica(Layout(1, 1)).place(0)
    groups = ReplicaGroups(place, None, (0,), None, (0,))
    stage = build_stage(folder, groups, {}, dtype=torch.bfloat16, stack_type=JointStack)
    stage.decoder.config._attn_implementation = register()
    stage.to("meta")
    for stack in stage.stacks:
        stack.device = stage.device
        stack.feature_keys = [keys.to(stage.device) for keys in stack.feature_keys]
        stack.fuses_dropout = True
    specs = {
        number: AdapterSpec(f"task {number}", 16, 4.0, MODULES, dropout=dropout)
        for number in range(num_tasks)
    }
    stage.install(specs)
    fuse_modules(stage.decoder)
    if policy is not None:
        apply_policy(stage.decoder.layers, policy)
    return stage


def launched(
    launches: Launches, stage: Stage, num_tasks: int, dropout: float = 0.0
) -> Counter[str]:
    """Return what a packed micro-batch with a sequence of each task launches, both passes."""
    lengths = (LENGTH,) * num_tasks
    num_tokens = sum(lengths)
    starts = range(0, num_tokens, LENGTH)
    segments = (Segment(number, start, start + LENGTH) for number, start in enumerate(starts))
    with torch.device("meta"):
        odds = torch.full((num_tokens,), dropout)
        noise = TokenNoise.of_tokens(torch.arange(num_tokens), odds, stage.dtype)
        stage.selection.tasks = TokenTasks(tuple(segments), noise if dropout else None)
        tokens = torch.empty(1, num_tokens, dtype=torch.int64)
        offsets = torch.empty(num_tasks + 1, dtype=torch.int32)
        factors = torch.empty(num_tokens)
    assert stage.head is not None
    launches.names.clear()
    with launches:
        output = stage.decoder(
            inputs_embeds=stage.decoder.embed_tokens(tokens),
            position_ids=tokens,
            attention_mask=None,
            use_cache=False,
            packing=Packing(lengths, offsets),
        ).last_hidden_state
        loss = (stage.head.losses(output[0], tokens[0]) * factors).sum()
        loss.backward()
    return launches.names.copy()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", [None, *MEMORY_POLICIES])
def test_a_layer_launches_little_and_no_more_for_more_tasks(
    policy: str | None, dropout: float, tmp_path: Path, launches: Launches
) -> None:
    folders = [save_llama(tmp_path / str(n), num_hidden_layers=n) for n in (1, 2)]
    of_a_layer = []
    for num_tasks in (1, 4, 16):
        stages = (stage_without_values(own, policy, num_tasks, dropout) for own in folders)
        fewer, more = (launched(launches, stage, num_tasks, dropout) for stage in stages)
        of_a_layer.append(more - fewer)
    assert of_a_layer[0] == of_a_layer[1] == of_a_layer[2]
    most = MOST_LAUNCHES[policy]
    if dropout:
        most += MORE_WITH_DROPOUT + (MORE_IN_FULL if policy == "full" else 0)
    assert of_a_layer[0].total() <= most, of_a_layer[0]


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.cpu, bool, lambda x: x[x > 0]],
)
def test_what_waits_for_a_value_fails_without_values(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty(1, device="meta"))
