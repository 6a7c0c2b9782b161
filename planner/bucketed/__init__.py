"""Planning where sequences are padded to buckets: LobRA's model, and EXACT's certified plans.

The model: ``buckets``, ``expected_batch``, ``time_table`` (what micro-batches take), ``problem``.
Dispatch: ``dispatch``, from ``initial_loads`` by ``local_search`` and ``resplit``; ``greedy``.
Bounds of one plan: ``fluid``, ``patterns`` and ``columns``; of all plans: ``fluid_planner``.
LobRA's planners: ``lobra``, by ``branch`` and ``identical`` (SCIP). Ours: ``exact``.
"""
