"""What turns texts into token ids for one model: its tokenizer, special tokens, chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.common.errors import ConfigError
from lobra.tasks.chat import ChatTemplate
from lobra.tasks.encoding import Encoder
from lobra.tasks.special_tokens import SpecialTokens
from lobra.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


#: Files beside a model's weights that may be its tokenizer's.
TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model")


class TextProcessor:
    """A model's tokenizer with what is derived from it, loaded when the first text is met.

    Data that are tokenised already need none of it.

    Parameters
    ----------
    load
        Returns the tokenizer.
    day
        The date that chat templates with a date are told; default: today.
    folder
        Returns the folder the tokenizer is loaded from, if it is; what is tokenised is then kept
        for the next run.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedTokenizerFast],
        day: date | None = None,
        folder: Callable[[], Path] | None = None,
    ) -> None:
        self._load = load
        self._folder = folder
        self.day = day or date.today()

    @classmethod
    def of_folder(cls, folder: Callable[[], Path], day: date | None = None) -> TextProcessor:
        """Return the processor of a model folder, which is looked for when it is needed."""
        return cls(lambda: load_tokenizer(folder()), day, folder)

    @cached_property
    def digest(self) -> str | None:
        """What the tokenizer's files hold, and the day if a chat template asks for it.

        None where there is no folder, or none that has a tokenizer.
        """
        try:
            folder = None if self._folder is None else self._folder()
        except ConfigError:
            return None
        if folder is None:
            return None
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in TOKENIZER_SUFFIXES:
                content = path.read_bytes()
                digest.update(f"{path.name} {len(content)}".encode() + content)
                if b"strftime_now" in content:
                    digest.update(self.day.isoformat().encode())
        return digest.hexdigest()

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
        return Encoder(self.tokenizer, self.specials)

    @cached_property
    def specials(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return SpecialTokens.of(self.tokenizer)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer, self.specials, self.day)
