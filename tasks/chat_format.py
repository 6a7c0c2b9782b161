"""Rows that are conversations, in any of the spellings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lobra.tasks.chat_reading import left_out, quotes_arguments
from lobra.tasks.conversations import SETTINGS, Conversation
from lobra.tasks.row_format import CONTRADICTION, Reading, RowFormat, SettingError
from lobra.tasks.text_rows import NOTHING, Row


class Chats(RowFormat):
    """Rows that are conversations, in any of the spellings."""

    kind = "chat"
    learns = "what the assistant says and its end of turn"

    def __init__(
        self,
        reading: Reading,
        make: Callable[[Mapping[str, Any]], Conversation],
        columns: Callable[[Mapping[str, Any]], Collection[str]],
    ) -> None:
        super().__init__(reading)
        self._make = make
        self._columns = columns
        self._ignored: list[str] = []
        self._left_out: list[str] = []  # what was, a line each
        self._num_quoted = 0

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return {*self._columns(fields), *SETTINGS}

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        conversation = self._make(fields)
        learn_all = self.reading.train_on_inputs
        if learn_all and conversation.is_marked:
            raise SettingError(CONTRADICTION)
        chat = self.reading.chat()
        self._ignored = chat.ignored_fields(conversation)
        rows = chat.rows(conversation, learn_all)
        self._left_out += left_out(conversation, rows, learn_all)
        self._num_quoted += quotes_arguments(conversation, rows)
        return [*rows] or [NOTHING]

    def ignored(self, fields: Mapping[str, Any]) -> list[str]:
        return [*super().ignored(fields), *self._ignored]

    def notes(self) -> list[str]:
        notes = []
        if self.reading.chat().is_own:
            notes.append(
                "the tokenizer has no chat template: turns are written as <|role|>, a line end "
                "and the content"
            )
        if self._left_out:
            notes.append(
                f"the chat template leaves out what {len(self._left_out)} messages say, in whole "
                f"or in part, such as {self._left_out[0]}"
            )
        if self._num_quoted:
            notes.append(
                f"{self._num_quoted} conversations give the arguments of tool calls as text, which "
                "the chat template quotes once more; give them as objects if that is not meant"
            )
        if self.num_split:
            notes.append(
                f"{self.num_split} conversations have become {self.num_parts} sequences, mostly "
                "one a turn: the chat template writes earlier turns differently once it goes on"
            )
        return notes
