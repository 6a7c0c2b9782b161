"""What turns texts into token ids for one model: its tokenizer, special tokens, chat template."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.tasks.chat import ChatTemplate
from lobra.tasks.encoding import Encoder
from lobra.tasks.special_tokens import SpecialTokens
from lobra.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextProcessor:
    """A model's tokenizer with what is derived from it, loaded when the first text is met.

    Data that are tokenised already need none of it.

    Parameters
    ----------
    load
        Returns the tokenizer.
    day
        The date that chat templates with a date are told; default: today.
    """

    def __init__(
        self, load: Callable[[], PreTrainedTokenizerFast], day: date | None = None
    ) -> None:
        self._load = load
        self.day = day or date.today()

    @classmethod
    def of_folder(cls, folder: str | Path, day: date | None = None) -> TextProcessor:
        """Return the processor of a model folder."""
        return cls(lambda: load_tokenizer(folder), day)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast | TextProcessor) -> TextProcessor:
        """Return the processor of a tokenizer that is there already."""
        return tokenizer if isinstance(tokenizer, cls) else cls(lambda: tokenizer)  # type: ignore

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer."""
        return self._load()

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer's way from texts to ids."""
        return Encoder(self.tokenizer)

    @property
    def specials(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return self.encoder.specials

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer, self.day)
