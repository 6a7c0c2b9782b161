"""Small tokenizers with chat templates in the manner of the well-known model families.

Each is saved and loaded as the real ones are. Templates and vocabularies are our own, and short;
what they share with the real ones are the traits that software trips over: where white space is
trimmed, what is special, what is rendered otherwise once the conversation goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lobra.tasks.tokenizer import load_tokenizer
from tests.tasks import transcripts
from tests.tasks.support import TEXTS
from tests.tasks.transcripts import Message, Transcriber, Transcript

TEMPLATES = Path(__file__).parent / "templates"
MARK = "\u2581"  # SentencePiece's space
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_LLAMA2 = ("<unk>", "<s>", "</s>")
_CORPUS = [
    *TEXTS,
    "user assistant system model tool function arguments name content",
    "What is the weather in Paris today? It is sunny, I think.",
    "USER: hello there ASSISTANT: hello, how are you?\n\nI am fine.\n",
    '{"type": "function", "function": {"name": "weather", "parameters": {"city": "Rome"}}}',
    "[INST] <<SYS>> [/INST] <|user|>\n<|assistant|>\n",
]


@dataclass(frozen=True)
class Family:
    """A family: its tokenizer, its template, and the conversations the template accepts.

    Attributes
    ----------
    name, transcribe
        The template is ``templates/<name>.jinja``; what it renders, in Python.
    space
        How the tokenizer writes spaces: ``bytes`` (byte-level BPE), or as SentencePiece's mark,
        with one before every stretch of text between added tokens (``prepend``, the old
        normaliser), before a text only (``first``, Metaspace), or not at all (``none``).
    special, added
        Added tokens that are special, and those that are not.
    bos, eos, pad
        Of ``special``. With ``puts_bos`` the tokenizer itself puts bos before a text.
    names_special
        ``tokenizer_config.json`` names all of ``special`` as such, not only bos, eos and pad.
    strips_right
        Special tokens that swallow the white space after them.
    composes
        The normaliser composes Unicode (NFC).
    in_config
        The template is saved in ``tokenizer_config.json``, in the old manner.
    alternates
        User and assistant have to take turns, a user first.
    calls
        How many calls of tools fit in a message; 0: no tools.
    announces_tools
        The template writes which tools there are.
    reasoning
        The field of a message with what it thought, if the template knows one.
    kwargs
        Values of ``chat_template_kwargs`` the template heeds.
    """

    name: str
    transcribe: Transcriber
    space: Literal["bytes", "prepend", "first", "none"]
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    added: tuple[str, ...] = ()
    puts_bos: bool = False
    names_special: bool = True
    strips_right: tuple[str, ...] = ()
    composes: bool = False
    in_config: bool = False
    has_system: bool = True
    alternates: bool = False
    calls: int = 0
    announces_tools: bool = True
    reasoning: str | None = None
    kwargs: tuple[dict[str, Any], ...] = ()

    @property
    def template(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")


_FAMILIES = [
    Family(
        "qwen25",
        transcripts.qwen25,
        "bytes",
        _CHATML,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        added=("<tool_call>", "</tool_call>"),
        composes=True,
        calls=2,
    ),
    Family(
        "qwen3",
        transcripts.qwen3,
        "bytes",
        _CHATML,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        added=(
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
            "</tool_response>",
            "<think>",
            "</think>",
        ),
        composes=True,
        calls=2,
        reasoning="reasoning_content",
        kwargs=({"enable_thinking": True}, {"enable_thinking": False}),
    ),
    Family(
        "llama2",
        transcripts.llama2,
        "prepend",
        _LLAMA2,
        bos="<s>",
        eos="</s>",
        puts_bos=True,
        in_config=True,
        alternates=True,
    ),
    Family(
        "llama3",
        transcripts.llama3,
        "bytes",
        _LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        puts_bos=True,
        names_special=False,
    ),
    Family(
        "llama32",
        transcripts.llama32,
        "bytes",
        (*_LLAMA3, "<|finetune_right_pad_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        puts_bos=True,
        names_special=False,
        alternates=True,
        calls=1,
        kwargs=({"date_string": "26 Jul 2024"},),
    ),
    Family(
        "mistral",
        transcripts.mistral,
        "first",
        (
            *_LLAMA2,
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        bos="<s>",
        eos="</s>",
        puts_bos=True,
        names_special=False,
        alternates=True,
        calls=2,
    ),
    Family(
        "gemma",
        transcripts.gemma,
        "none",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        puts_bos=True,
        has_system=False,
        alternates=True,
    ),
    Family(
        "phi3",
        transcripts.phi3,
        "prepend",
        (*_LLAMA2, "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        names_special=False,
        strips_right=("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    ),
    Family(
        "zephyr",
        transcripts.zephyr,
        "prepend",
        _LLAMA2,
        bos="<s>",
        eos="</s>",
        pad="</s>",
        puts_bos=True,
        in_config=True,
    ),
    Family(
        "vicuna",
        transcripts.vicuna,
        "prepend",
        _LLAMA2,
        bos="<s>",
        eos="</s>",
        pad="<unk>",
        puts_bos=True,
        in_config=True,
    ),
    Family(
        "deepseek_r1",
        transcripts.deepseek_r1,
        "bytes",
        (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁outputs▁begin｜>",
            "<｜tool▁outputs▁end｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
            "<｜tool▁sep｜>",
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        puts_bos=True,
        names_special=False,
        calls=2,
        announces_tools=False,
    ),
    Family(
        "harmony",
        transcripts.harmony,
        "bytes",
        (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|constrain|>",
            "<|channel|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|call|>",
        ),
        bos="<|startoftext|>",
        eos="<|return|>",
        pad="<|endoftext|>",
        names_special=False,
        calls=1,
        reasoning="thinking",
        kwargs=({"reasoning_effort": "low"},),
    ),
    Family(
        "generation",
        transcripts.generation,
        "bytes",
        _CHATML,
        eos="<|endoftext|>",
    ),
    Family(
        "granite",
        transcripts.granite,
        "bytes",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
        calls=2,
        kwargs=({"documents": [{"title": "Rain", "text": "It is wet."}]},),
    ),
]
FAMILIES = {family.name: family for family in _FAMILIES}


@cache
def load_family(name: str, root: Path) -> Any:
    """Return a family's tokenizer, loaded from the folder under ``root`` it was saved to."""
    family = FAMILIES[name]
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    backend = _byte_level(family) if family.space == "bytes" else _sentence_piece(family)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "added_tokens_decoder": {
            str(backend.token_to_id(token.content)): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token in _added_tokens(family)
        },
        "bos_token": family.bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": family.eos,
        "model_max_length": 8192,
        "pad_token": family.pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if family.names_special:
        config["additional_special_tokens"] = [
            token for token in family.special if token not in (family.bos, family.eos, family.pad)
        ]
    if family.in_config:
        config["chat_template"] = family.template
    else:
        (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def transcript(
    family: Family, messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]
) -> Transcript:
    """Return what the template renders, without its generation prompt, and its turns."""
    return family.transcribe(messages, tools, kwargs)


def token_spans(family: Family, tokenizer: Any, ids: Sequence[int], text: str) -> list[Any]:
    """Return the characters (start, end) of every token of a text.

    Found by laying the tokens' own bytes along the text, not by the tokenizer's offsets. A
    character of several tokens belongs to each.

    Raises
    ------
    ValueError
        If the tokens do not spell the text.
    """
    composed = normalize("NFC", text) if family.composes else text
    data = composed.encode()
    places = []
    at = 0
    fresh = True  # a stretch of text begins
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    for token in ids:
        start = at
        if int(token) in added:
            piece = added[int(token)].content.encode()
            fresh = True
        else:
            piece = _bytes_of(family, tokenizer.convert_ids_to_tokens(int(token)))
            if fresh and family.space == "prepend":
                piece = piece.removeprefix(b" ")
            fresh = False
        if not data.startswith(piece, at):
            raise ValueError(f"token {piece!r} at {data[at : at + 40]!r} of {composed!r}")
        at += len(piece)
        if int(token) in added and added[int(token)].rstrip:
            rest = data[at:].decode()
            at += len(rest.encode()) - len(rest.lstrip().encode())
        places.append((start, at))
    if at != len(data):
        raise ValueError(f"no tokens for {data[at:]!r}, the end of {composed!r}")
    first, last = [], []  # the character of each byte, and the first one not before it
    for index, character in enumerate(composed):
        size = len(character.encode())
        first += [index] * size
        last += [index, *[index + 1] * (size - 1)]
    first.append(len(composed))
    last.append(len(composed))
    return [(first[a], last[b]) for a, b in places]


def _added_tokens(family: Family) -> list[AddedToken]:
    return [
        AddedToken(
            content,
            special=content in family.special,
            normalized=False,
            rstrip=content in family.strips_right,
        )
        for content in (*family.special, *family.added)
    ]


def _byte_level(family: Family) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if family.composes:
        backend.normalizer = normalizers.NFC()
    words = (
        r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    backend.train_from_iterator([*_CORPUS, *_CORPUS], trainer)
    backend.add_tokens(_added_tokens(family))
    # Llama 3's leaves spaces out of the offsets.
    parts: list[Any] = [processors.ByteLevel(trim_offsets=family.puts_bos)]
    backend.post_processor = processors.Sequence([*parts, *_beginning(family, backend)])
    return backend


def _sentence_piece(family: Family) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", MARK)
    parts: list[Any] = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if family.space == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), spaces])
        parts.append(decoders.Strip(" ", 1, 0))
    elif family.space == "none":
        backend.normalizer = spaces
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
        parts = [decoders.ByteFallback(), decoders.Metaspace(MARK, prepend_scheme="first")]
    backend.decoder = decoders.Sequence(parts)
    control = [token for token in family.special if token in (*_LLAMA2, "<pad>", "<eos>", "<bos>")]
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=[*control, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Words apart, as SentencePiece has them: tokens do not reach over a space; many spaces are one.
    before = "" if family.space == "prepend" else " "
    words = [before + word for text in _CORPUS * 2 for word in text.split()]
    backend.train_from_iterator([*words, *["    "] * 9], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = []  # the trainer makes every byte a special token
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens(_added_tokens(family))
    beginning = _beginning(family, backend)
    if beginning:
        backend.post_processor = beginning[0]
    return backend


def _beginning(family: Family, backend: Tokenizer) -> list[Any]:
    if not family.puts_bos:
        return []
    special = [(family.bos, backend.token_to_id(family.bos))]
    return [processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=special)]


def _bytes_of(family: Family, piece: str) -> bytes:
    if family.space == "bytes":
        return bytes(_byte_of()[character] for character in piece)
    if piece.startswith("<0x") and len(piece) == 6:
        return bytes([int(piece[3:5], 16)])
    return piece.replace(MARK, " ").encode()


@cache
def _byte_of() -> dict[str, int]:
    """Return the byte of each character of byte-level vocabularies: GPT-2's order of them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }
