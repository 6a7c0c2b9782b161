"""The arithmetic of a training step, whoever computes it and however: what MFU counts."""

from __future__ import annotations

from lobra.layout.sequences import Work
from lobra.layout.shapes import ModelShape

# A product with m parameters takes 2 m floating-point operations a token, and so does the gradient
# of its input. The gradient of its weights, as much again, is for what is trained only.
FROZEN, TRAINED = 4, 6
# Of a layer, an element of a head and two positions: 4 for scores and weighted sum, twice that
# in the backward pass; half of it all, as causal attention looks at half of the pairs.
ATTENTION = 6


def training_flops(
    shape: ModelShape,
    work: Work,
    rank: int,
    target_modules: tuple[str, ...],
    trains_base: bool = False,
) -> float:
    """Return the floating-point operations that training on sequences once takes.

    They are those of the model (PaLM, Chowdhery et al. 2022, appendix B) for a frozen base: 4 a
    parameter of the layers and token, 4 a parameter of the head and token to be predicted, 6 an
    element of the adapter and token (on the head, and token to be predicted), and 6 x heads x
    head_dim a layer and pair of positions, as causal attention has half of the pairs (PaLM's own
    count has all). Neither padding nor what is computed again counts; norms, embeddings with their
    adapters, softmax and loss are left out as there.

    Parameters
    ----------
    shape
        The base model.
    work
        The sequences: their tokens, squared lengths and labels.
    rank, target_modules
        Of the adapter that is trained.
    trains_base
        Whether the base is, too: its parameters count as the adapter's do.
    """
    of_base = TRAINED if trains_base else FROZEN
    of_a_layer = sum(inputs * outputs for inputs, outputs in shape.linear_sizes().values())
    num_layers = shape.num_layers
    of_layers, of_head = (
        shape.adapter_elements(rank, target_modules, layers)
        for layers in (range(num_layers), range(num_layers, num_layers + 1))
    )
    attention = ATTENTION * shape.num_heads * shape.head_dim * work.squares
    return float(
        of_base * work.tokens * num_layers * of_a_layer
        + of_base * work.labels * shape.hidden_size * shape.vocab_size
        + TRAINED * (work.tokens * of_layers + work.labels * of_head)
        + num_layers * attention
    )
