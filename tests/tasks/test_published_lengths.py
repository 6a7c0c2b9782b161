"""Lengths like those of LobRA's data sets: what was published of them, and what was fitted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from experiments.published import LENGTHS
from experiments.synthetic import synthesize
from lobra.tasks.lengths import load_lengths
from lobra.tasks.published_lengths import MIXTURES, published_lengths
from lobra.tasks.sources import PUBLISHED


def test_every_data_set_has_the_published_moments() -> None:
    assert list(MIXTURES) == list(LENGTHS) == list(PUBLISHED)
    for name, lengths in load_lengths("published").items():
        wanted = LENGTHS[name]
        assert lengths.min() >= 1 and lengths.max() <= MIXTURES[name].longest
        assert np.mean(lengths) == pytest.approx(wanted.mean, rel=0.002)
        if name != "xsum":  # no lengths of at most its context have its skewness and kurtosis
            assert stats.skew(lengths) == pytest.approx(wanted.skewness, rel=0.02)
            assert stats.kurtosis(lengths) == pytest.approx(wanted.kurtosis, rel=0.05)


@pytest.mark.parametrize("name", ["dolly", "billsum"])
def test_the_mixtures_are_what_the_fit_finds(name: str) -> None:
    fitted = np.sort(synthesize(LENGTHS[name], MIXTURES[name].longest, seed=0).lengths)
    assert np.abs(np.sort(published_lengths(name)) - fitted).max() <= 0.01 * fitted.max()


def test_the_seed_decides_the_order_and_nothing_else() -> None:
    one, other = published_lengths("xsum", 1), published_lengths("xsum", 2)
    assert not np.array_equal(one, other)
    assert np.array_equal(np.sort(one), np.sort(other))
