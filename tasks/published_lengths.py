"""Sequence lengths like those of LobRA's twelve data sets, so that planning needs no data.

LobRA published mean, skewness and kurtosis of each data set's lengths, and the context it is
trained with. A mixture of two log-normal distributions, cut at that context, was fitted to them
(``experiments/synthetic.py``, whose results these are); the lengths are its values at evenly spaced
quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from lobra.tasks.lengths import Lengths

NUM_SEQUENCES = 20000
SHORTEST = 8  # tokens


@dataclass(frozen=True)
class Mixture:
    """Two log-normal distributions, the second one's median ``apart`` (a logarithm) from the first.

    Attributes
    ----------
    mean
        Of the lengths, in tokens, once they are cut at ``longest``.
    longest
        The context length, in tokens.
    num_in_tail
        Sequences of the second distribution.
    body, tail
        Logarithms of the standard deviations of the logarithms of lengths.
    apart
        The distance between the distributions.
    """

    mean: float
    longest: int
    num_in_tail: int
    body: float
    tail: float
    apart: float

    def lengths(self, number: int = NUM_SEQUENCES) -> np.ndarray:
        """Return so many lengths, float64, those of the tail last."""
        body, tail = np.exp(np.clip((self.body, self.tail), -4.0, 0.7))
        low, high = (
            ndtri((np.arange(count) + 0.5) / max(count, 1))
            for count in (number - self.num_in_tail, self.num_in_tail)
        )
        values = np.concatenate([body * low, np.clip(self.apart + tail * high, -20, 20)])
        return scaled(np.exp(values), np.ones(number), self.mean, self.longest)


#: By the names that LobRA's trainer configurations have for them.
MIXTURES: Mapping[str, Mixture] = {
    "dolly": Mixture(207, 8192, 375, -0.7821186353738545, -0.564838058995258, 1.5099953635181536),
    "python_code_instructions": Mixture(
        269, 16384, 375, -2.1995705111286252, -0.7946769275016731, 2.3914778795712732
    ),
    "evol_instruct": Mixture(
        702, 16384, 1207, -1.0699589687616862, -0.42764988808426624, 0.8310322423683911
    ),
    "commitpackft": Mixture(
        663, 8192, 4963, -0.5207538094532863, -19.572128237360932, 0.9223941912012945
    ),
    "MathInstruct": Mixture(
        252, 8192, 4431, -0.537460226277041, -0.617518353951577, 2.3277009969884834
    ),
    "MetaMathQA": Mixture(
        236, 4096, 2424, -0.8021642364135904, -0.5471118657069205, 0.3758666935245203
    ),
    "NuminaMath-CoT": Mixture(
        543, 8192, 1719, -0.4898382329608435, -4.810703327586518, 1.1728214636848602
    ),
    "PubMedQA": Mixture(
        371, 2048, 10026, -0.16351252119928084, -1.7014017053455777, 1.1733483930407451
    ),
    "xsum": Mixture(526, 16384, 1, -0.6697328916566989, -0.680180705525109, 5.644125340772238),
    "billsum": Mixture(
        3903, 16384, 11452, -1.9844629201793635, -1.1263069510267014, 1.1185530738068752
    ),
    "cnn_dailymail": Mixture(
        947, 8192, 9989, -0.8501702618861151, -1.1280813573973874, 1.0351323127713687
    ),
    "meetingbank": Mixture(
        3622, 16384, 263, -1.1247582110919834, -1.231744095230233, 2.6622467267580427
    ),
}


def published_lengths(name: str, seed: int = 0) -> Lengths:
    """Return lengths like those of one of the twelve data sets, int64 [20000], shuffled."""
    lengths = np.rint(MIXTURES[name].lengths()).astype(np.int64)
    # a data set's own seed, so that it has the same order whatever stands beside it
    rng = np.random.default_rng(seed + list(MIXTURES).index(name))
    shuffled: Lengths = rng.permutation(lengths)
    return shuffled


def scaled(values: np.ndarray, weights: np.ndarray, mean: float, longest: int) -> np.ndarray:
    """Return the values times the factor that gives the weighted mean once they are cut."""
    scale = mean / float(weights @ values / weights.sum())
    for _ in range(8):
        cut = np.clip(values * scale, SHORTEST, longest)
        scale *= mean / float(weights @ cut / weights.sum())
    return np.clip(values * scale, SHORTEST, longest)
