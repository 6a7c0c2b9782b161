"""Imported last by the fork server: what it has imported by then is nothing that ranks collect.

A collection in a rank would look through all of it, half a second each time, and by that copy the
pages of memory that ranks share.
"""

import gc

gc.collect()
gc.freeze()
