"""Examples of two sequences: of the answers to a prompt, or of one and the answer to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from lobra.tasks.config import TaskConfig
from lobra.tasks.data_report import DataReport
from lobra.tasks.encoding import FloatArray, Ids, Mask
from lobra.tasks.objectives import KTO, SEQUENCES_OF_EXAMPLE


class Answer(NamedTuple):
    """A tokenised prompt with its answer.

    `learned` says which tokens are of the answer; `sign` is 1 if it is wanted, -1 if not, and 0 if
    it is only compared with; `place` is that of its row. Of tokens that were sampled `sampled`
    [2, tokens] has their logprobs and their advantages.
    """

    place: str
    tokens: Ids
    learned: Mask
    sign: int
    sampled: FloatArray | None = None

    @property
    def start(self) -> int:
        """The place of the answer's first token; something precedes it."""
        return max(1, int(self.learned.argmax()))


def examples(task: TaskConfig, answers: Iterable[Answer], report: DataReport) -> Iterator[Answer]:
    """Yield the sequences of a task's examples, those of one adjacent.

    An example that does not fit into the context is left out whole: cut, its answers would be to
    different prompts. Of KTO's the second sequence is the prompt with the answer of the example
    before, in a circle; its end is cut.
    """
    is_single = task.objective == KTO
    size = 1 if is_single else SEQUENCES_OF_EXAMPLE
    rest = iter(answers)
    fitting = [
        one for one in iter(lambda: tuple(islice(rest, size)), ()) if _fits(task, one, report)
    ]
    for number, own in enumerate(fitting):
        if is_single:
            own = (own[0], _compared(task, own[0], fitting[number - 1][0]))
        for answer in own:
            report.origins.append((answer.place, len(answer.tokens)))
            yield answer._replace(learned=np.arange(len(answer.tokens)) >= answer.start)


def _fits(task: TaskConfig, answers: tuple[Answer, ...], report: DataReport) -> bool:
    reason = None
    if any(not answer.learned[1:].any() for answer in answers):
        reason = "nothing to learn"
    elif max(len(answer.tokens) for answer in answers) > task.context_length:
        reason = "an answer and its prompt are longer than the context length"
    if reason is not None:
        report.drop(reason, answers[0].place)
    return reason is None


def _compared(task: TaskConfig, own: Answer, other: Answer) -> Answer:
    """Return the prompt of one answer with another answer."""
    tokens = np.concatenate([own.tokens[: own.start], other.tokens[other.start :]])
    tokens = tokens[: task.context_length]
    return Answer(own.place, tokens, np.arange(len(tokens)) >= own.start, 0)
