"""Planning of packed steps: micro-batches of whole sequences end to end, without buckets.

Plans: ``problem``, ``rates`` (what sequences cost at least), ``exact``, ``roles``, ``deploy``.
Dispatch: ``dispatch``. Both: ``least_times`` of micro-batches.
"""
