"""What a model says with and without adapters: transformers generates, PEFT loads the adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lobra.common.errors import ConfigError
from lobra.tasks.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest, or drawn at a temperature.

    Attributes
    ----------
    max_new_tokens
        The most tokens of an answer; it ends earlier with the model's end token.
    temperature
        What scores are divided by before a token is drawn; None: the likeliest token is taken.
    seed
        Of the draw, which begins anew with every answer.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Return what transformers' generate is told."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature is not None,
            "temperature": self.temperature,
            "top_k": None,
            "top_p": None,
        }


def answers(
    base: Path,
    adapters: Sequence[Path | None],
    prompts: Sequence[str],
    sampling: Sampling,
    device: str = "cpu",
) -> Iterator[list[str]]:
    """Yield the answers to all prompts of each adapter in turn; None is the base alone.

    A prompt is given as it is, after the tokens that the tokenizer begins every text with. Answers
    are without special tokens.

    Raises
    ------
    ConfigError
        A folder is no model, or no adapter of this base that PEFT can load.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False)
    model = model.to(device).eval()
    for folder in adapters:
        adapted = model if folder is None else _adapted(model, folder)
        yield [_answer(adapted, tokenizer, prompt, sampling) for prompt in prompts]
        if folder is not None:
            model = adapted.unload()


def _adapted(model: Any, folder: Path) -> Any:
    try:
        with warnings.catch_warnings():  # of what PEFT asks of transformers, to its authors
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(model, folder).eval()
    except Exception as error:  # of many kinds; its message says what PEFT did not like
        raise ConfigError(f"{folder}: PEFT loads no adapter of this base ({error})") from error


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> str:
    torch.manual_seed(sampling.seed)
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**tokens, **sampling.options(), pad_token_id=tokenizer.pad_token_id)
    answer: str = tokenizer.decode(output[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
    return answer
