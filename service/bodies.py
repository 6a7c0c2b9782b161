"""The JSON bodies of requests, as far as the service reads them; fields it does not know pass."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AliasChoices, BaseModel, Field, model_validator

MOST_METADATA = 1 << 16  # bytes of JSON
MOST_LIFE_S = 10 * 366 * 86400  # ten years
MOST_NUMBER = 1 << 31


def _is_small_json(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return metadata that can be told again as it was sent."""
    if len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode()) > MOST_METADATA:
        raise ValueError(f"want at most {MOST_METADATA:,} bytes")
    return value


FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
SeqId = Annotated[int, Field(ge=1, lt=MOST_NUMBER)]
Number = Annotated[int, Field(ge=0, lt=MOST_NUMBER)]
LifeS = Annotated[int, Field(ge=1, le=MOST_LIFE_S)]
Metadata = Annotated[dict[str, Any] | None, AfterValidator(_is_small_json)]


class Body(BaseModel):
    """A body, which can be written down as it was sent."""

    model_config = {"protected_namespaces": ()}

    @model_validator(mode="after")
    def _is_json(self) -> Self:
        self.model_dump_json()  # a ValueError where half a character is sent
        return self


class OfSession(Body):
    """Of a session."""

    session_id: str


class Optimizer(Body):
    """The family of an optimiser."""

    type: Literal["adamw"] = "adamw"


class Adapter(Body):
    """Which adapter a model is: Tinker's LoraConfig."""

    rank: Annotated[int, Field(ge=1)] = 32
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(OfSession):
    """A model is made."""

    model_seq_id: Number
    base_model: str
    user_metadata: Metadata = None
    lora_config: Adapter = Adapter()
    optimizer_config: Optimizer = Optimizer()


class OfModel(Body):
    """Of a model."""

    model_id: str
    seq_id: SeqId | None = None


class AdamParams(Body):
    """What an optimiser step does."""

    learning_rate: Annotated[FiniteFloat, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[FiniteFloat, Field(ge=0)] = 1e-12
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[FiniteFloat, Field(ge=0)] = 0.0


class OptimStep(OfModel):
    """An optimiser step is taken."""

    adam_params: Annotated[
        AdamParams, Field(validation_alias=AliasChoices("adam_params", "optim_params"))
    ]


class SaveForSampler(OfModel):
    """A model is written down to be sampled from; without a name a sampling session is made."""

    path: Name | None = None
    sampling_session_seq_id: Number | None = None
    ttl_seconds: LifeS | None = None
    user_metadata: Metadata = None

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.path is None and self.sampling_session_seq_id is None:
            raise ValueError("path: is missing")
        return self


class SaveWeights(OfModel):
    """A model is written down."""

    path: Name
    ttl_seconds: LifeS | None = None
    overwrite: bool = False
    user_metadata: Metadata = None


class OfLife(Body):
    """How long a checkpoint is kept from now on; None: for ever."""

    ttl_seconds: LifeS | None


class LoadWeights(Body):
    """A checkpoint becomes a model, new (of a session) or known (by its name)."""

    model_id: str | None = None
    seq_id: SeqId | None = None
    session_id: str | None = None
    model_seq_id: Number | None = None
    base_model: str | None = None
    user_metadata: Metadata = None
    path: str
    optimizer: bool
    optimizer_config: Optimizer | None = None


class CreateSampler(OfSession):
    """A sampling session is made."""

    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class TextChunk(Body):
    """Tokens of a prompt."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[int]


class Prompt(Body):
    """What sampling goes on from."""

    chunks: Annotated[list[TextChunk], Field(min_length=1)]


class SamplingParams(Body):
    """The distribution that is sampled from, and where a sequence ends."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    top_k: int = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Sample(Body):
    """Samples are asked for."""

    sampling_session_id: str
    seq_id: Number
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: Prompt
    sampling_params: SamplingParams
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Literal[0] = 0
    topk_sample_logprobs: Literal[0] = 0
    target_prompt_logprobs: None = None
    prompt_alt_tokens_k: Literal[0] = 0
    prompt_logprobs_last_n: None = None


class RetrieveFuture(Body):
    """A request's result is asked for."""

    request_id: str


class WeightsInfo(Body):
    """A checkpoint is asked about."""

    tinker_path: str
