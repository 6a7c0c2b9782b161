"""A tokenizer's own chat template, used where its rendering can be split into turns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.rows import ChatRenderer, Message, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def chat_renderer(tokenizer: PreTrainedTokenizerFast) -> ChatRenderer | None:
    """Return a renderer by the tokenizer's chat template, or None if it has none.

    The template runs in transformers' sandbox. A conversation is rendered only if that is safe:
    the template must accept its roles, render it so that each assistant turn continues the text
    before it, and no message may spell a special token, which would end its turn early. Where that
    fails the renderer returns None and says so once in the log.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    specials = sorted(filter(None, tokenizer.all_special_tokens))
    told: set[str] = set()

    def decline(reason: str) -> TextRow | None:
        if reason not in told:
            told.add(reason)
            logger.warning("chat template of the tokenizer not used for some rows: %s", reason)
        return None

    def render(messages: Sequence[Message]) -> TextRow | None:
        for message in messages:
            if any(special in message["content"] for special in specials):
                return decline("a message spells a special token")
        try:
            turns = _split(tokenizer, messages)
        except Exception as error:  # templates raise what they like, for roles they refuse
            return decline(f"it raises {type(error).__name__}: {error}")
        if turns is None:
            return decline("it rewrites earlier turns")
        return TextRow(turns, complete=True)

    return render


def _split(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[tuple[str, str], ...] | None:
    """Return (read, learned) of each assistant turn, or None if a turn changes the text before."""

    def rendered(count: int, prompted: bool) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages[:count]],
            tokenize=False,
            add_generation_prompt=prompted,
        )
        assert isinstance(text, str)
        return text

    whole = rendered(len(messages), False)
    turns = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = rendered(index, True), rendered(index + 1, False)
        if not (whole.startswith(after) and after.startswith(before) and done <= len(before)):
            return None
        if not after[len(before) :].strip():
            return None
        turns.append((whole[done : len(before)], after[len(before) :]))
        done = len(after)
    return tuple(turns)
