"""What an adapter's parameters take on a rank, and what exchanging them takes beyond that."""

from __future__ import annotations

FLOAT_BYTES = 4
# Of an adapter's parameter: fp32 value and gradient on every rank that holds it, and fp32 master
# copy and two AdamW moments shared by the holders (ZeRO stage 1).
ADAPTER_BYTES, OPTIMIZER_BYTES = 8, 12


def exchange_bytes(elements: int, num_holders: int) -> int:
    """Return the most bytes a rank holds while the adapters of its layers are exchanged.

    As `trainer.block.BlockOptimizer` does it, all layers being one block (a test compares): in the
    update a rank holds its part of the summed gradients, its part of the new weights in one piece,
    and all holders' parts gathered. That is more than when gradients are summed: all of them in
    one piece, and this rank's part. Activations are not alive meanwhile. What the library of
    collectives keeps for itself is not in it.

    Parameters
    ----------
    elements
        Parameters of all tasks' adapters in the rank's layers.
    num_holders
        Ranks that hold those layers, in all replicas. One sends nothing and copies the weights
        once.
    """
    if num_holders == 1:
        return FLOAT_BYTES * elements
    part = -(-elements // num_holders)
    return FLOAT_BYTES * (num_holders * part + 2 * part)


def most_exchange_bytes(elements: int, tp: int) -> int:
    """Return `exchange_bytes` for the fewest holders there can be beside others: the most.

    A profile does not know the plan: a replica may be alone (its tp ranks hold a layer) or one of
    many.
    """
    return exchange_bytes(elements, max(2, tp))
