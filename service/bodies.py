"""The JSON bodies of requests, as far as the service reads them; fields it does not know pass."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Field

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
SeqId = Annotated[int, Field(ge=1, lt=1 << 31)]
Metadata = dict[str, Any] | None


class Body(BaseModel):
    """A body."""

    model_config = {"protected_namespaces": ()}


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

    model_seq_id: Annotated[int, Field(ge=0)]
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


class SaveWeights(OfModel):
    """A model is written down."""

    path: Name
    ttl_seconds: Annotated[int, Field(ge=1)] | None = None
    overwrite: bool = False
    user_metadata: Metadata = None


class LoadWeights(Body):
    """A checkpoint becomes a model, new (of a session) or known (by its name)."""

    model_id: str | None = None
    seq_id: SeqId | None = None
    session_id: str | None = None
    model_seq_id: Annotated[int, Field(ge=0)] | None = None
    base_model: str | None = None
    user_metadata: Metadata = None
    path: str
    optimizer: bool
    optimizer_config: Optimizer | None = None


class RetrieveFuture(Body):
    """A request's result is asked for."""

    request_id: str
