"""The two tiers of the suite: what `scripts/test.sh` runs, and what only `--all` adds.

The default tier draws the same examples every time, so that it passes or fails whatever the day;
``--all`` draws more of them, and others each time.
"""

from __future__ import annotations

from hypothesis import settings

DEFAULT, ALL = "default", "all"


def register_profiles() -> None:
    """Make both tiers known to hypothesis; no example has a deadline, machines are shared."""
    settings.register_profile(DEFAULT, max_examples=50, derandomize=True, deadline=None)
    settings.register_profile(
        ALL, max_examples=500, derandomize=False, deadline=None, print_blob=True
    )


def examples(default: int, more: int) -> settings:
    """Return, as a decorator, how many examples a property draws: by default and with ``--all``.

    For properties of which an example is dear (or very cheap); others leave it to the profile.
    """
    chosen = more if settings.get_current_profile_name() == ALL else default
    return settings(max_examples=chosen)
