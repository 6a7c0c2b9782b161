"""Both stacks compute what a loop over PEFT's own LoRA layers computes, gradients included."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, VeraConfig, VeraModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from lobra.layout.shapes import ModelShape
from lobra.model.adapted_linear import AdaptedLinear
from lobra.model.adapter import AdapterSpec
from lobra.model.base_linear import DenseLinear, Shard
from lobra.model.dropout import TokenNoise, token_keys
from lobra.model.joint_stack import JointStack
from lobra.model.segment_stack import SegmentStack
from lobra.model.sharded_layer import ROW_PARALLEL, linear_shards
from lobra.model.site import PEFT_PREFIX, SHARED_INPUTS, Site
from lobra.model.slot import Slot
from lobra.model.stack import Stack
from lobra.model.token_tasks import Segment, Selection, TokenTasks
from lobra.tasks.kinds import ADAPTERS

SHAPE = ModelShape("small", 1, 8, 12, 4, 2, 2, 16)
MODULES = tuple(SHAPE.linear_sizes())
NOBODY = 100  # a task without an adapter
CPU, DOUBLE = torch.device("cpu"), torch.float64


class FewRanksStack(JointStack):
    """Has micro-batches of several tasks in several parts, absent tasks in none."""

    most_ranks = 4
    least_spared = 0


ways = pytest.mark.parametrize("way", [SegmentStack, JointStack, FewRanksStack])


def spec(number: int, rank: int, modules: tuple[str, ...] = MODULES, **fields: Any) -> AdapterSpec:
    return AdapterSpec(f"task {number}", rank, 3.0, modules, **fields)


@dataclass(frozen=True)
class Case:
    """Tasks on the linears of one input, and a micro-batch: (task, tokens) of each segment."""

    specs: dict[int, AdapterSpec]
    lengths: list[tuple[int, int]]
    modules: tuple[str, ...] = SHARED_INPUTS[0]
    tp: int = 1
    input_needs_gradient: bool = True
    with_bias: bool = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Whose the tokens are."""
        stops = torch.tensor([0, *(tokens for _, tokens in self.lengths)]).cumsum(0).tolist()
        numbers = [number for number, _ in self.lengths]
        return tuple(map(Segment, numbers, stops[:-1], stops[1:]))

    def random(self, *size: int, seed: int = 0) -> Tensor:
        """Return random numbers, the same for the same size and seed."""
        return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)

    def weight(self, module: str) -> tuple[Tensor, Tensor | None]:
        """Return a linear's weight and bias."""
        inputs, outputs = SHAPE.linear_sizes()[module]
        seed = MODULES.index(module)
        bias = self.random(outputs, seed=seed) if self.with_bias else None
        return self.random(outputs, inputs, seed=seed), bias

    def slot(self, number: int) -> Slot:
        """Return a task's adapter with nothing at zero."""
        slot = Slot(number, self.specs[number], SHAPE, range(1), DOUBLE, CPU)
        slot.weights.copy_(self.random(len(slot.weights), seed=number))
        if slot.start is not None:
            slot.start.copy_(self.random(len(slot.start), seed=1000 + number))
        return slot


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random kinds, ranks and modules; tasks may be absent, and tokens without an adapter.

    The lengths of rows that are split need a group of ranks: DoRA is not drawn there.
    """
    modules, tp = draw(st.sampled_from(SHARED_INPUTS)), draw(st.sampled_from([1, 2]))
    rows_are_split = tp == 2 and modules[0] in ROW_PARALLEL
    kinds = [kind for kind in ADAPTERS if kind != "dora" or not rows_are_split]
    patterns = st.dictionaries(st.sampled_from(MODULES), st.integers(1, 4), max_size=2)
    numbers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    specs = {}
    for number in numbers:
        kind = draw(st.sampled_from(kinds))
        specs[number] = AdapterSpec(
            f"task {number}",
            draw(st.integers(1, 4)),
            draw(st.sampled_from([0.5, 3.0, 16.0])),
            tuple(draw(st.sets(st.sampled_from(MODULES), min_size=1))),
            kind=kind,
            rank_pattern=() if kind == "vera" else tuple(draw(patterns).items()),
            alpha_pattern=() if kind == "vera" else tuple(draw(patterns).items()),
        )
    segments = st.tuples(st.sampled_from([*numbers, NOBODY]), st.integers(1, 4))
    return Case(
        specs,
        draw(st.lists(segments, min_size=1, max_size=5)),
        modules,
        tp,
        draw(st.booleans()),
        draw(st.booleans()),
    )


def make_stack(
    case: Case, way: type[Stack], tp_index: int, slots: dict[int, Slot], dtype: torch.dtype = DOUBLE
) -> tuple[Stack, list[Shard]]:
    """Return a stack with adapters, and its shards."""
    shards = [linear_shards(SHAPE, case.tp, tp_index)[module] for module in case.modules]
    bases = []
    for module, shard in zip(case.modules, shards, strict=True):
        weight, bias = case.weight(module)
        rows, columns = (slice(r.start, r.stop) for r in (shard.outputs, shard.inputs))
        own = None if bias is None or (shard.is_row_parallel and tp_index) else bias[rows].to(dtype)
        bases.append(DenseLinear(weight[rows, columns].to(dtype), own))
    sites = [Site(0, module, *SHAPE.linear_sizes()[module]) for module in case.modules]
    stack = way(sites, shards, bases, Selection(TokenTasks(case.segments)), dtype, CPU)
    stack.arrange(slots)
    return stack, shards


def ours(case: Case, way: type[Stack], apart: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return outputs and gradients by name, added up over the shards, and the input's gradient."""
    found: dict[str, Tensor] = Counter()  # type: ignore[assignment]
    x, dx = inputs(case), torch.zeros_like(inputs(case))
    for tp_index in range(case.tp):
        slots = {number: case.slot(number) for number in case.specs}
        stack, shards = make_stack(case, way, tp_index, slots)
        stack.selection.tasks = TokenTasks(case.segments, apart=apart)
        part = x[..., shards[0].inputs.start : shards[0].inputs.stop].clone()
        part.requires_grad_(case.input_needs_gradient)
        loss = torch.zeros((), dtype=DOUBLE)
        for linear, (module, shard) in enumerate(zip(case.modules, shards, strict=True)):
            y = AdaptedLinear(stack, linear)(part)
            outputs = slice(shard.outputs.start, shard.outputs.stop)
            whole = torch.zeros(*x.shape[:-1], shard.out_features, dtype=DOUBLE)
            whole[..., outputs] = y.detach()
            found[module] = found[module] + whole
            loss = loss + (y * output_gradient(case, module)[..., outputs]).sum()
        if loss.requires_grad:
            loss.backward()
        if part.grad is not None:
            dx[..., shards[0].inputs.start : shards[0].inputs.stop] += part.grad
        for number, slot in slots.items():
            for name, gradient in slot.layout.named(slot.gradient).items():
                found[f"{number} {name}"] = found[f"{number} {name}"] + gradient
    return found, dx if case.input_needs_gradient else None


def inputs(case: Case) -> Tensor:
    return case.random(1, case.segments[-1].stop, SHAPE.linear_sizes()[case.modules[0]][0], seed=7)


def output_gradient(case: Case, module: str) -> Tensor:
    size = (1, case.segments[-1].stop, SHAPE.linear_sizes()[module][1])
    return case.random(*size, seed=MODULES.index(module))


def inject(own: AdapterSpec, targets: list[str], model: nn.Module) -> None:
    """Have PEFT put an adapter on some linears."""
    if own.kind == "vera":
        VeraModel(model, VeraConfig(r=own.rank, target_modules=targets), "default")
        return
    config = LoraConfig(
        r=own.rank,
        lora_alpha=own.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        rank_pattern={k: v for k, v in own.rank_pattern if k in targets},  # type: ignore[misc]
        alpha_pattern={k: v for k, v in own.alpha_pattern if k in targets},  # type: ignore[misc]
        use_rslora=own.kind == "rslora",
        use_dora=own.kind == "dora",
    )
    inject_adapter_in_model(config, model)


def peft(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Return the same from PEFT's layers: a model for each task, segment by segment."""

    def linears() -> nn.ModuleDict:
        made = nn.ModuleDict()
        for module in case.modules:
            weight, bias = case.weight(module)
            made[module] = nn.Linear(*reversed(weight.shape), bias is not None, dtype=DOUBLE)
            made[module].weight.data = weight
            if bias is not None:
                made[module].bias.data = bias
        return made

    models, parameters = {NOBODY: linears()}, {}
    for number, own in case.specs.items():
        models[number] = linears()
        slot = case.slot(number)
        named = slot.layout.named(slot.weights)
        targets = [module for module in case.modules if module in own.target_modules]
        if targets:
            inject(own, targets, models[number])
        for name, value in named.items():
            module, factor = name.removesuffix(".weight").split(".")[-2:]
            parameters[f"{number} {name}"] = value
            if module in targets:
                layer = getattr(models[number][module], factor)["default"]
                parameter = layer if isinstance(layer, nn.Parameter) else layer.weight
                parameter.data = value.clone()
                parameters[f"{number} {name}"] = parameter
        if slot.projections is not None:
            for module in targets:  # PEFT's own are drawn for these linears only
                models[number][module].vera_A["default"] = slot.projections.A_rI
                models[number][module].vera_B["default"] = slot.projections.B_rO.t()
        if slot.start is not None:
            starts = slot.layout.named(slot.start)
            for module in targets:
                adapted, name = models[number][module], PEFT_PREFIX + Site(0, module, 1, 1).path
                A, B = (starts[f"{name}.lora_{factor}.weight"] for factor in "AB")
                adapted.base_layer.weight.data = (
                    adapted.base_layer.weight - adapted.scaling["default"] * B @ A
                )
    x = inputs(case).requires_grad_(True)
    found, loss = {}, torch.zeros((), dtype=DOUBLE)
    for module in case.modules:
        parts = [models[s.number][module](x[:, s.start : s.stop]) for s in case.segments]
        found[module] = torch.cat(parts, dim=1).detach()
        loss = loss + (torch.cat(parts, dim=1) * output_gradient(case, module)).sum()
    loss.backward()
    assert x.grad is not None
    for name, parameter in parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found, x.grad


@ways
@given(case=cases(), apart=st.booleans())
def test_a_stack_equals_a_loop_of_peft(way: type[Stack], case: Case, apart: bool) -> None:
    expected, expected_dx = peft(case)
    found, dx = ours(case, way, apart)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    if dx is not None:
        torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-12)


MIXED = Case({2: spec(2, 2), 0: spec(0, 3, ("q_proj", "v_proj"))}, [(0, 2), (2, 3), (0, 1)])


def noise_of(case: Case) -> TokenNoise:
    """Return the noise of a micro-batch whose segments are sequences."""
    lengths = torch.tensor([tokens for _, tokens in case.lengths])
    dropouts = [case.specs[number].dropout for number, _ in case.lengths]
    keys = token_keys(range(len(lengths)), lengths.numpy())
    return TokenNoise.of_tokens(
        torch.from_numpy(keys), torch.tensor(dropouts).repeat_interleave(lengths), DOUBLE
    )


@ways
@pytest.mark.parametrize("modules", SHARED_INPUTS)
def test_dropout_is_scaled_out_of_the_input(way: type[Stack], modules: tuple[str, ...]) -> None:
    """Finite differences of A and B too: the backward pass draws the factors that were used."""
    specs = {number: replace(own, dropout=0.4) for number, own in MIXED.specs.items()}
    case = replace(MIXED, specs={**specs, 5: spec(5, 1)}, modules=modules)
    case = replace(case, lengths=[*case.lengths, (5, 2)])
    slots = {number: case.slot(number) for number in case.specs}
    stack, segment_stack = (make_stack(case, one, 0, slots)[0] for one in (way, SegmentStack))
    for one in (stack, segment_stack):
        one.selection.tasks = replace(one.selection.tasks, noise=noise_of(case))
    x = inputs(case).requires_grad_(True)
    for linear in range(len(modules)):
        ys = [AdaptedLinear(one, linear)(x) for one in (stack, segment_stack)]
        torch.testing.assert_close(ys[0], ys[1], rtol=1e-12, atol=1e-12)

    def loss(x: Tensor) -> Tensor:
        return sum(  # type: ignore[return-value]
            (AdaptedLinear(stack, linear)(x) * output_gradient(case, module)).sum()
            for linear, module in enumerate(modules)
        )

    assert torch.autograd.gradcheck(loss, (x,))
    for slot in slots.values():
        slot.gradient.zero_()  # gradcheck has been through the backward pass
    loss(x).backward()
    for slot in slots.values():
        for place in range(0, len(slot.weights), 5):
            losses = []
            for change in (1e-6, -2e-6, 1e-6):
                slot.weights[place] += change
                stack.refresh()
                losses.append(float(loss(x).detach()))
            slope = (losses[0] - losses[1]) / 2e-6
            assert float(slot.gradient[place]) == pytest.approx(slope, abs=1e-6)


@ways
def test_gradients_are_added_once_when_layers_are_computed_again(way: type[Stack]) -> None:
    gradients = []
    for again in (False, True):
        slots = {number: MIXED.slot(number) for number in MIXED.specs}
        stack, _ = make_stack(MIXED, way, 0, slots)
        linears = [AdaptedLinear(stack, linear) for linear in range(3)]

        def layer(x: Tensor, linears: list[AdaptedLinear] = linears) -> Tensor:
            return torch.cat([linear(x) for linear in linears], dim=-1).sin()

        x = inputs(MIXED).requires_grad_(True)
        (checkpoint(layer, x, use_reentrant=False) if again else layer(x)).sum().backward()
        assert x.grad is not None
        gradients.append([x.grad, *(slot.gradient for slot in slots.values())])
    for kept, computed in zip(*gradients, strict=True):
        assert kept.abs().max() > 0
        assert torch.equal(kept, computed)


@ways
def test_a_broken_adapter_harms_no_other_task_that_is_apart(way: type[Stack]) -> None:
    slots = {number: MIXED.slot(number) for number in MIXED.specs}
    slots[0].weights.fill_(float("nan"))
    stack, _ = make_stack(MIXED, way, 0, slots)
    stack.selection.tasks = replace(stack.selection.tasks, apart=True)
    x = inputs(MIXED).requires_grad_(True)
    y = AdaptedLinear(stack, 0)(x)
    y.sum().backward()
    assert y[0, :2].isnan().all()
    assert x.grad is not None
    for value in (y[0, 2:5], x.grad[0, 2:5], slots[2].gradient):
        assert value.isfinite().all()


@ways
def test_tasks_come_and_go_and_others_stay(way: type[Stack]) -> None:
    """What a stack computes for a task is bit for bit what it computed among others."""
    slots = {number: MIXED.slot(number) for number in MIXED.specs}
    alone = replace(MIXED, lengths=[(2, 3)])
    x = inputs(alone)
    outputs = []
    for there in ([2], [0, 2], [2]):
        stack, _ = make_stack(alone, way, 0, {number: slots[number] for number in there})
        outputs.append(AdaptedLinear(stack, 1)(x).detach())
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ADAPTERS)
@ways
def test_bf16_computes_with_copies_and_sums_in_fp32(way: type[Stack], kind: str) -> None:
    case = replace(MIXED, specs={**MIXED.specs, 2: replace(MIXED.specs[2], kind=kind)})
    slots = {number: case.slot(number) for number in case.specs}
    for slot in slots.values():
        slot.weights, slot.gradient = slot.weights.float(), slot.gradient.float()
        slot.start = None if slot.start is None else slot.start.float()
        slot.projections = slot.projections and slot.projections.to(CPU, torch.bfloat16)
    stack, _ = make_stack(case, way, 0, slots, torch.bfloat16)
    x = inputs(case).bfloat16().requires_grad_(True)
    AdaptedLinear(stack, 0)(x).sum().backward()
    exact = {number: case.slot(number) for number in case.specs}
    reference, _ = make_stack(case, SegmentStack, 0, exact)
    AdaptedLinear(reference, 0)(inputs(case)).sum().backward()
    for number, slot in slots.items():
        error = (slot.gradient - exact[number].gradient).norm() / exact[number].gradient.norm()
        assert slot.gradient.dtype == torch.float32 and error < 2e-2
    before = AdaptedLinear(stack, 0)(x)
    slots[2].weights.zero_()
    stack.refresh()
    after = AdaptedLinear(stack, 0)(x.clone())
    assert not torch.equal(before[0, 2:5], after[0, 2:5]), "after a refresh new weights count"
    assert torch.equal(before[0, :2], after[0, :2])


def test_a_joint_stack_computes_few_ranks_at_a_time() -> None:
    specs = {number: spec(number, 16) for number in range(40)} | {40: spec(40, 300)}
    case = Case(specs, [(number, 2) for number in specs])
    stack, _ = make_stack(case, JointStack, 0, {number: case.slot(number) for number in specs})
    parts = stack.parts(stack.selection.tasks)
    rows = [len(part.factors.A.weights_Rf()) for part in parts]
    assert rows == [3 * ranks for ranks in (16 * 16, 16 * 16, 8 * 16, 300)]
    assert [part.tokens for part in parts] == [*map(slice, (0, 32, 64, 80), (32, 64, 80, 82))]


@pytest.mark.parametrize(("num_tokens", "num_present"), [(100, 16), (20_000, 15)])
def test_absent_tasks_are_left_out_where_that_spares_much(
    num_tokens: int, num_present: int
) -> None:
    specs = {number: spec(number, 16) for number in range(16)}
    case = Case(specs, [(number, num_tokens // 15) for number in range(15)])
    stack, _ = make_stack(case, JointStack, 0, {number: case.slot(number) for number in specs})
    (part,) = stack.parts(stack.selection.tasks)
    assert len(part.factors.A.weights_Rf()) == 3 * 16 * num_present


@pytest.mark.parametrize("num_absent", [0, 3])
def test_operations_of_a_joint_stack_do_not_grow_with_the_tasks(num_absent: int) -> None:
    counts = []
    for num_tasks in (1, 2, 4, 16):
        specs = {number: spec(number, 2) for number in range(num_tasks + num_absent)}
        case = Case(specs, [(number, 2) for number in range(num_tasks)])
        slots = {number: case.slot(number) for number in specs}
        stack, _ = make_stack(case, JointStack, 0, slots)
        x = inputs(case).requires_grad_(True)
        AdaptedLinear(stack, 0)(x)  # what a micro-batch asks once for all layers
        with profile() as profiled:
            ys = [AdaptedLinear(stack, linear)(x) for linear in range(3)]
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        events = [event for event in profiled.events() or [] if event.name.startswith("aten::")]
        counts.append(Counter(event.name for event in events if not of_an_operation(event)))
    one, *more = counts
    assert more[0] == more[1] == more[2]
    assert sum(one.values()) <= sum(more[0].values())
    assert more[0]["aten::_foreach_add_"] == 1


def of_an_operation(event: Any) -> bool:
    """Return whether an operation is part of another."""
    return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
