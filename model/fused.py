"""A layer's elementwise work in one kernel each: norms, rotary embedding, product of activations.

On a GPU each is a row of small kernels, every one of which reads and writes all of the activations.
torch compiles transformers' own functions, whatever the family, once for all layers and numbers of
tokens, and has the kernels round where these do: the result is theirs, but for the order of sums.
torch's own ``rms_norm`` would not do: it rounds once where Llama's norms round twice, and has no
form for Gemma's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lobra.model.compiled import TRIED_TOKENS, compiled
from lobra.model.dropout import try_out_dropout
from lobra.model.fp8_linear import Fp8Linear, rounded, rounded_at_once

logger = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"  # in the module of every family's attention


def fuse(decoder: Any) -> bool:
    """Have the elementwise work of a decoder's layers run as few kernels, where that is faster.

    On CPU, and in fp32 and fp64, the decoder stays as it is; so it does, with a warning, where
    torch cannot compile.

    Returns
    -------
    bool
        Whether they do; then LoRA dropout can be fused, too.
    """
    if not _is_faster(next(decoder.parameters())):
        return False
    try:
        try_out(decoder)
        try_out_dropout(next(decoder.parameters()))
    except Exception as problem:  # of any kind: a compiler, a driver or triton may be missing
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        logger.warning(
            "norms, activations and dropout run unfused, as torch cannot compile: %s", reason
        )
        return False
    fuse_modules(decoder)
    return True


def _is_faster(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def fuse_modules(decoder: Any) -> None:
    """Replace the forward passes of a decoder's norms, attentions and MLPs by fused ones."""
    for module in decoder.modules():
        if _is_norm(module):
            module.forward = partial(_normed, module)
        elif _rotary_of(module) is not None:
            module.forward = _with_fused_rotary(module)
        elif _is_gated(module):
            module.forward = partial(_gated, module)
        elif isinstance(module, Fp8Linear):
            module.is_fused = True


def try_out(decoder: Any) -> None:
    """Compile what `fuse_modules` has modules call; raise what a compiler raises.

    It is compiled apart for passes without gradients, where none is wanted of the inputs, and with.
    """
    weight = next(decoder.parameters())
    for has_gradients, is_wanted in ((False, False), (True, False), (True, True)):

        def sample(*size: int, is_wanted: bool = is_wanted) -> Tensor:
            return weight.new_ones(size).requires_grad_(is_wanted)

        for module in decoder.modules():
            with torch.set_grad_enabled(has_gradients):
                outputs = _sampled(module, sample)
            if is_wanted and outputs:
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    rounding = (module for module in decoder.modules() if isinstance(module, Fp8Linear))
    for in_features in {module.in_features for module in rounding}:  # of all layers alike
        _try_out_rounding(weight.new_empty(TRIED_TOKENS, in_features))


def _sampled(module: Any, sample: Callable[..., Tensor]) -> list[Tensor]:
    """Return what is fused of a module, of inputs of any numbers."""
    tokens = TRIED_TOKENS
    if _is_norm(module):
        return [_normed(module, sample(tokens, len(module.weight)))]
    if (rotary := _rotary_of(module)) is not None:
        cos = sample(1, tokens, module.head_dim).detach()
        query, key = (  # views, as attentions make them of what products return
            sample(1, tokens, heads * module.head_dim)
            .view(1, tokens, heads, module.head_dim)
            .transpose(1, 2)
            for heads in (32, 8)
        )
        return _rotated(rotary, query, key, cos, cos.clone())
    if _is_gated(module):
        size = 1, tokens, module.up_proj.out_features
        return [_activated(module, sample(*size), sample(*size))]
    return []


@torch.no_grad()
def _try_out_rounding(x: Tensor) -> None:
    """Compile what rounds rows like these, and hold it to what it stands for: every bit counts."""
    x.normal_(generator=torch.Generator(x.device).manual_seed(0))
    pairs = zip(rounded_at_once(x), rounded(x), strict=True)
    if not all(torch.equal(ours.float(), plain.float()) for ours, plain in pairs):
        raise RuntimeError("what rounds to eight bits rounds otherwise when it is compiled")


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Return the norm of x, by rows, so that tokens and heads are compiled for alike."""
    normed: Tensor = compiled(type(norm).forward)(norm, x.flatten(0, -2))
    return normed.view(x.shape)


def _rotary_of(module: Any) -> Callable[..., Any] | None:
    """Return the rotary embedding that an attention calls; None of any other module."""
    if not hasattr(module, "q_proj") and not hasattr(module, "qkv_proj"):
        return None
    return getattr(sys.modules[type(module).__module__], ROTARY, None)


def _with_fused_rotary(attention: Any) -> Callable[..., Any]:
    """Return the attention's forward pass, which finds the fused embedding by its name."""
    home, forward = sys.modules[type(attention).__module__], attention.forward
    plain = getattr(home, ROTARY)
    fused = partial(_rotated, plain)

    @wraps(forward)
    def fused_forward(*args: Any, **kwargs: Any) -> Any:
        setattr(home, ROTARY, fused)
        try:
            return forward(*args, **kwargs)
        finally:
            setattr(home, ROTARY, plain)

    return fused_forward


def _rotated(
    rotary: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """Return what the embedding makes of heads [B, H, S, d].

    It is given [B, S, H, d], as the products made them: their gradients then lie as products need
    them.
    """
    tensors = (query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    for tensor in tensors:
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    turned = compiled(rotary)(*tensors, unsqueeze_dim=2)
    return [heads.transpose(1, 2) for heads in turned]


def _product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _gated(mlp: Any, x: Tensor) -> Tensor:
    """Return what a gated MLP computes."""
    output: Tensor = mlp.down_proj(_activated(mlp, mlp.gate_proj(x), mlp.up_proj(x)))
    return output


def _activated(mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Return the product of activations; of a known number of features several are read at once."""
    for tensor in (gate, up):
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    product: Tensor = compiled(_product)(mlp.act_fn, gate, up)
    return product


def _is_gated(module: Any) -> bool:
    """Return whether the module's own forward pass computes what `_gated` computes."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    stand_in = SimpleNamespace(
        gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.tan, act_fn=module.act_fn
    )
    x = torch.linspace(-3, 3, 7)
    try:
        own: Tensor = type(module).forward(stand_in, x)
    except (AttributeError, TypeError):  # it needs more than a gated MLP has
        return False
    return torch.equal(own, torch.tan(_product(module.act_fn, torch.sin(x), torch.cos(x))))
