"""Sampling from the base model with adapters: a process of its own, with a copy of the whole model.

Requests of several tenants are one batch, each row with its own adapter, temperature and generator,
so that what a request gets does not depend on what else is sampled, but for rounding.

Shape suffixes: B rows, S tokens of the longest, V vocabulary, I and O features, r LoRA rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lobra.layout.sequences import FloatArray, TokenArray
from lobra.model.precision import DTYPES
from lobra.model.site import PEFT_PREFIX
from lobra.trainer.adapters import CONFIG_FILE, WEIGHTS_FILE

#: A and B [r, I], [O, r] by the linear's name; B scaled.
Adapter = dict[str, tuple[Tensor, Tensor]]
MOST_ROWS = 64  # sequences drawn at once


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """What is to be sampled.

    Attributes
    ----------
    prompt
        int32 [n].
    num_samples, max_tokens
        How many sequences, and of how many tokens at most.
    temperature, top_k, top_p
        The distribution that is drawn from: 0 takes the likeliest token; a top_k below 1 and a
        top_p of 1 leave all tokens in.
    seed
        Of the first sequence; each has its own.
    stop_tokens, stop_texts
        What ends a sequence; it is part of it.
    prompt_logprobs
        Whether the prompt's logprobs are wanted.
    adapter
        The folder of the adapter; None: the base model's own.
    row_bytes
        What one of its sequences takes while it is drawn.
    """

    prompt: TokenArray
    num_samples: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_tokens: tuple[int, ...]
    stop_texts: tuple[str, ...]
    prompt_logprobs: bool
    adapter: Path | None
    row_bytes: int = 0

    def divided(self, most_rows: int) -> Iterator[SampleRequest]:
        """Yield requests of at most so many sequences, which together are those of this one."""
        for done in range(0, self.num_samples, most_rows):
            count = min(most_rows, self.num_samples - done)
            yield replace(self, num_samples=count, seed=self.seed + done)


@dataclass(eq=False)
class SampledSequence:
    """What was sampled: tokens, the model's own logprob of each, and whether it came to an end."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_stopped: bool = False


@dataclass(frozen=True, eq=False)
class SampleResult:
    """The sequences of a request, and the logprob of each token of the prompt (NaN: the first)."""

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: FloatArray | None


def sample_for_ever(
    connection: Connection, folder: Path, precision: str, device: str, free_bytes: int
) -> None:
    """Answer lists of requests with lists of results, until the other end is closed."""
    sampler = Sampler(folder, precision, device, free_bytes)
    while True:
        try:
            requests = connection.recv()
        except EOFError:
            return
        connection.send(sampler.sample(requests))


class Sampler:
    """The base model with transformers' own forward pass and cache.

    Attributes
    ----------
    free_bytes
        What the sequences that are drawn at once may take.
    """

    def __init__(
        self, folder: Path, precision: str, device: str, free_bytes: int = 1 << 40
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.free_bytes = free_bytes
        self.device = torch.device(device)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])
        self.model = model.to(self.device).eval()
        self.tokenizer: Any = None
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        end = self.model.generation_config.eos_token_id
        self.ends = frozenset(end if isinstance(end, list) else () if end is None else (end,))
        self.adapters: dict[Path, Adapter] = {}  # of the last requests

    def _load(self, folder: Path) -> Adapter:
        """Return an adapter from its folder."""
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        scale = config["lora_alpha"] / config["r"]
        pairs = {}
        for name, value in tensors.items():
            linear, _, side = name.removeprefix(PEFT_PREFIX).partition(".lora_")
            if side.startswith("A"):
                other = tensors[name.replace(".lora_A.", ".lora_B.")]
                dtype = self.model.dtype
                pairs[linear] = (
                    value.to(self.device, dtype),
                    (other * scale).to(self.device, dtype),
                )
        return pairs

    @torch.no_grad()
    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResult | None]:
        """Return the results of requests, in order, drawn as many at once as memory holds.

        None where the adapter is not there any more.
        """
        kept, self.adapters = self.adapters, {}
        for folder in {request.adapter for request in requests if request.adapter is not None}:
            with suppress(FileNotFoundError):
                self.adapters[folder] = kept.get(folder) or self._load(folder)
        there = {None, *self.adapters}
        pieces = [
            (place, piece)
            for place, request in enumerate(requests)
            if request.adapter in there
            for piece in request.divided(self._most_rows(request))
        ]
        pieces.sort(key=lambda entry: (str(entry[1].adapter), entry[0]))
        found: list[list[SampleResult]] = [[] for _ in requests]
        for batch in self._batches(pieces):
            for (place, _), result in zip(batch, self._sample([p for _, p in batch]), strict=True):
                found[place].append(result)
        return [
            SampleResult(
                tuple(sequence for part in parts for sequence in part.sequences),
                parts[0].prompt_logprobs,
            )
            if parts
            else None
            for parts in found
        ]

    def _most_rows(self, request: SampleRequest) -> int:
        return max(1, min(MOST_ROWS, self.free_bytes // max(1, request.row_bytes)))

    def _batches(
        self, pieces: Sequence[tuple[int, SampleRequest]]
    ) -> Iterator[list[tuple[int, SampleRequest]]]:
        """Yield pieces that are drawn at once; a row is padded to the largest of its batch."""
        batch: list[tuple[int, SampleRequest]] = []
        for entry in pieces:
            together = [piece for _, piece in (*batch, entry)]
            rows = sum(piece.num_samples for piece in together)
            if batch and rows > min(map(self._most_rows, together)):
                yield batch
                batch = []
            batch.append(entry)
        if batch:
            yield batch

    def _sample(self, requests: list[SampleRequest]) -> list[SampleResult]:
        """Return the results of requests that are sorted by adapter."""
        tokens_BS, mask_BS = self._padded(requests)
        adapters = [request.adapter for request in requests]
        wants_prompt = any(request.prompt_logprobs for request in requests)
        with self._adapted(adapters):
            output = self.model(
                input_ids=tokens_BS,
                attention_mask=mask_BS,
                position_ids=_positions(mask_BS),
                use_cache=True,
                logits_to_keep=0 if wants_prompt else 1,
            )
        prompts = [
            self._prompt_logprobs(*pair) for pair in zip(requests, output.logits, strict=True)
        ]
        rows = [place for place, one in enumerate(requests) for _ in range(one.num_samples)]
        of_row = torch.tensor(rows, device=self.device)
        output.past_key_values.batch_select_indices(of_row)
        sequences = self._decode(
            [requests[place] for place in rows],
            output.logits[of_row, -1],
            output.past_key_values,
            mask_BS[of_row],
        )
        found = iter(sequences)
        return [
            SampleResult(tuple(next(found) for _ in range(one.num_samples)), prompt)
            for one, prompt in zip(requests, prompts, strict=True)
        ]

    def _decode(
        self, rows: list[SampleRequest], logits_BV: Tensor, cache: Any, mask_BS: Tensor
    ) -> list[SampledSequence]:
        """Return a sequence for every row, of which the prompts are in the cache."""
        sequences = [SampledSequence() for _ in rows]
        generators = [
            torch.Generator().manual_seed(row.seed + sum(other is row for other in rows[:place]))
            for place, row in enumerate(rows)
        ]
        while True:
            logprobs_BV = logits_BV.float().log_softmax(-1).cpu()
            drawn = []
            for row, own, generator, logprobs_V in zip(
                rows, sequences, generators, logprobs_BV, strict=True
            ):
                token = _draw(row, logprobs_V, generator)
                drawn.append(token)
                if not own.is_stopped and len(own.tokens) < row.max_tokens:
                    own.tokens.append(token)
                    own.logprobs.append(float(logprobs_V[token]))
                    own.is_stopped = self._stops(row, own)
            if all(
                own.is_stopped or len(own.tokens) == row.max_tokens
                for row, own in zip(rows, sequences, strict=True)
            ):
                return sequences
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(rows), 1)], dim=1)
            with self._adapted([row.adapter for row in rows]):
                output = self.model(
                    input_ids=torch.tensor(drawn, device=self.device)[:, None],
                    attention_mask=mask_BS,
                    position_ids=_positions(mask_BS)[:, -1:],
                    past_key_values=cache,
                    use_cache=True,
                )
            logits_BV = output.logits[:, -1]

    def _stops(self, request: SampleRequest, sequence: SampledSequence) -> bool:
        """Return whether a sequence has come to its end."""
        last = sequence.tokens[-1]
        if last in request.stop_tokens or last in self.ends:
            return True
        if not request.stop_texts or self.tokenizer is None:
            return False
        text = self.tokenizer.decode(sequence.tokens)
        return any(stop in text for stop in request.stop_texts)

    def _padded(self, requests: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
        """Return the prompts [B, S], padded on the left, and where they are not padding."""
        longest = max(len(request.prompt) for request in requests)
        tokens_BS = np.zeros((len(requests), longest), dtype=np.int64)
        mask_BS = np.zeros_like(tokens_BS)
        for row, request in enumerate(requests):
            tokens_BS[row, longest - len(request.prompt) :] = request.prompt
            mask_BS[row, longest - len(request.prompt) :] = 1
        return (
            torch.from_numpy(tokens_BS).to(self.device),
            torch.from_numpy(mask_BS).to(self.device),
        )

    def _prompt_logprobs(self, request: SampleRequest, logits_SV: Tensor) -> FloatArray | None:
        if not request.prompt_logprobs:
            return None
        length = len(request.prompt)
        logprobs_SV = logits_SV[-length:-1].float().log_softmax(-1).cpu()
        following = torch.from_numpy(request.prompt[1:].astype(np.int64))
        found = logprobs_SV.gather(-1, following[:, None])[:, 0]
        return np.concatenate([[np.nan], found.numpy().astype(np.float64)])

    @contextmanager
    def _adapted(self, adapters: Sequence[Path | None]) -> Iterator[None]:
        """Add each row's adapter to the linears; rows with the same one are adjacent."""
        spans: list[tuple[slice, Adapter]] = []
        start = 0
        for stop in range(1, len(adapters) + 1):
            if stop == len(adapters) or adapters[stop] != adapters[start]:
                if (folder := adapters[start]) is not None:
                    spans.append((slice(start, stop), self.adapters[folder]))
                start = stop
        handles = []
        for name in {name for _, pairs in spans for name in pairs}:
            own = [(rows, *pairs[name]) for rows, pairs in spans if name in pairs]
            linear = self.model.get_submodule(name)
            handles.append(linear.register_forward_hook(_Addition(own)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Addition:
    """Adds low-rank products to a linear's output, row by row."""

    def __init__(self, spans: list[tuple[slice, Tensor, Tensor]]) -> None:
        self.spans = spans

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor, ...], output_BSO: Tensor) -> Tensor:
        for rows, a_rI, b_Or in self.spans:
            output_BSO[rows] += inputs[0][rows] @ a_rI.t() @ b_Or.t()
        return output_BSO


def _positions(mask_BS: Tensor) -> Tensor:
    """Return each token's place in its sequence, whatever padding is before it."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def _draw(request: SampleRequest, logprobs_V: Tensor, generator: torch.Generator) -> int:
    """Return a token drawn from what temperature, top_k and top_p leave of a distribution."""
    if request.temperature == 0.0:
        return int(logprobs_V.argmax())
    probabilities_V = (logprobs_V / request.temperature).softmax(-1)
    if 0 < request.top_k < len(probabilities_V):
        least = probabilities_V.topk(request.top_k).values[-1]
        probabilities_V = probabilities_V.masked_fill(probabilities_V < least, 0.0)
    if request.top_p < 1.0:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        dropped_V = order_V[before_V > request.top_p * sorted_V.sum()]
        probabilities_V = probabilities_V.index_fill(0, dropped_V, 0.0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
