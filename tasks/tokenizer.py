"""Tokenizers: loading a model folder's, and training a small one for the embedded default."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.common.errors import ConfigError, show

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# The special tokens of common tokenizers, to recognise them where no configuration names them.
_KNOWN_BOS = (BOS, "<|begin_of_text|>", "<|endoftext|>")
_KNOWN_EOS = (EOS, "<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
_KNOWN_PAD = (PAD, "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a local model folder; it has an end and a padding token.

    Read are ``tokenizer.json`` with its Hugging Face configuration files, or GPT-2's
    ``vocab.json`` and ``merges.txt`` (also with a prefix, as in ``gpt2-vocab.json``). Nothing is
    fetched and no code of the folder is run. Without a padding token the end token pads.

    Raises
    ------
    ConfigError
        If the folder holds no such files, they cannot be read, or no end token is known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no tokenizer at {folder}: want a folder with tokenizer.json")
    pair = _find_bpe_files(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = _load_hf_folder(folder)
        elif pair:
            tokenizer = _wrap(_load_bpe(*pair))
        else:
            raise ConfigError(_missing(folder))
    except ConfigError:
        raise
    except Exception as error:  # the Rust library raises bare Exception for every malformed file
        raise ConfigError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ConfigError(f"{folder}: chat_template = {show(tokenizer.chat_template)}: want a text")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{folder}: the tokenizer has no end token: name it as eos_token in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on ``texts``, deterministic in them.

    It has ``<pad>``, ``<s>`` and ``</s>`` as ids 0, 1 and 2, puts ``<s>`` before a text as Llama's
    does, and can spell every text since all 256 bytes are tokens.

    Raises
    ------
    ValueError
        If ``vocab_size`` has no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [PAD, BOS, EOS]
    if vocab_size < len(alphabet) + len(specials):
        raise ValueError(f"vocab_size {vocab_size}: want {len(alphabet) + len(specials)} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def _find_bpe_files(folder: Path) -> tuple[Path, Path] | None:
    for vocab in sorted(folder.glob("*vocab.json")):
        merges = folder / f"{vocab.name.removesuffix('vocab.json')}merges.txt"
        if merges.is_file():
            return vocab, merges
    return None


def _load_bpe(vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = (*_KNOWN_BOS, *_KNOWN_EOS, *_KNOWN_PAD)
    present = {token for token in known if tokenizer.token_to_id(token) is not None}
    tokenizer.add_special_tokens(sorted(present))
    return tokenizer


def _load_hf_folder(folder: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer_config.json").is_file():
        return _wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a bare tokenizer as transformers' own, its special tokens found by their names."""
    from transformers import PreTrainedTokenizerFast

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if tokenizer.token_to_id(name) is not None), None)

    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first(_KNOWN_BOS),
        eos_token=first(_KNOWN_EOS),
        pad_token=first(_KNOWN_PAD),
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder}: has tokenizer.model but no tokenizer.json: make it once with transformers, "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt"
