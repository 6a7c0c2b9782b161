"""Tinker's protobuf messages, as far as the service speaks them.

The classes are made from the field numbers below, so that the client's package is not needed.
Enumerations are sent as plain integers, which is the same on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from lobra.common.errors import ConfigError, Problems, show
from lobra.layout.sequences import Clipping, FloatArray, TokenArray
from lobra.service.sampler import SampleResult

PACKAGE = "tinker_public"
CONTENT_TYPE = "application/x-protobuf"

#: Of each message its fields: name -> (number, type). A type is a scalar's name, a message's name,
#: or either after "repeated " or "map " (from strings).
FIELDS: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "ForwardBackwardRequest": {
        "model_id": (1, "string"),
        "seq_id": (2, "int32"),
        "data": (3, "repeated Datum"),
        "loss_fn": (4, "string"),
        "forward_only": (6, "bool"),
        "loss_fn_config_v2": (7, "map LossConfigValue"),
    },
    "LossConfigValue": {"number": (1, "double"), "text": (2, "string")},
    "Datum": {"model_input": (1, "repeated Chunk"), "loss_fn_inputs": (2, "map Tensor")},
    "Chunk": {"encoded_text": (1, "EncodedTextChunk")},
    "EncodedTextChunk": {"tokens": (1, "bytes")},
    "Tensor": {
        "dense": (1, "bytes"),
        "sparse_csr": (2, "SparseCsr"),
        "dtype": (3, "int32"),
        "shape": (4, "repeated int64"),
    },
    "SparseCsr": {"values": (1, "bytes")},
    "SampleResponse": {
        "sequences": (1, "repeated SampledSequence"),
        "prompt_logprobs": (2, "bytes"),
    },
    "SampledSequence": {
        "stop_reason": (1, "int32"),
        "tokens": (2, "bytes"),
        "logprobs": (3, "bytes"),
    },
    "ForwardBackwardOutput": {
        "loss_fn_output_type": (1, "string"),
        "loss_fn_outputs": (2, "repeated ArrayRecord"),
        "metrics": (3, "map double"),
    },
    "ArrayRecord": {
        "type_tag": (1, "string"),
        "fields": (2, "map BatchedTensor"),
        "num_datums": (3, "int64"),
    },
    "BatchedTensor": {
        "data": (1, "bytes"),
        "offsets": (2, "bytes"),
        "dtype": (3, "int32"),
        "trailing_shape": (4, "repeated int64"),
    },
}
#: Of a tensor's dtype its numbers.
DTYPES: Mapping[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}
FLOAT32 = 1
TOKEN_BYTES = 4
STOPPED, TOO_LONG = 0, 1
#: Of each loss what a datum has beside the model's input, each with an element per token.
LOSSES: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("target_tokens", "weights"),
    "importance_sampling": ("target_tokens", "logprobs", "advantages"),
    "ppo": ("target_tokens", "logprobs", "advantages"),
}
#: The settings of ppo, with their defaults.
CLIPPING = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def _message_classes() -> dict[str, type[Message]]:
    """Return the classes of all messages by name."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="lobra_service.proto", package=PACKAGE, syntax="proto3"
    )

    def add(message: Any, name: str, number: int, kind: str, repeated: bool) -> None:
        field = message.field.add(name=name, number=number)
        field.label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
        if kind[0].islower():
            field.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
        else:
            field.type = field_type.TYPE_MESSAGE
            field.type_name = f".{PACKAGE}.{kind}"

    for message_name, fields in FIELDS.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            form, _, inner = kind.rpartition(" ")
            if form == "map":
                entry_name = "".join(map(str.capitalize, name.split("_"))) + "Entry"
                entry = message.nested_type.add(name=entry_name)
                entry.options.map_entry = True
                add(entry, "key", 1, "string", False)
                add(entry, "value", 2, inner, False)
                inner = f"{message_name}.{entry_name}"
            add(message, name, number, inner, form in ("map", "repeated"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in FIELDS
    }


MESSAGES = _message_classes()


@dataclass(frozen=True, eq=False)
class Datum:
    """One sequence of a request.

    Attributes
    ----------
    tokens
        int32 [n].
    labels
        int32 [n]: what is to follow each token.
    weights
        float64 [n]: what the loss of each label is multiplied by; of a policy's the advantages.
    sampled
        float64 [n]: of a policy's loss the logprobs of the labels when they were sampled.
    """

    tokens: TokenArray
    labels: TokenArray
    weights: FloatArray
    sampled: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class LossRequest:
    """A call of ``forward_backward`` or, `forward_only`, of ``forward``.

    `policy` is of data with sampled logprobs; without one the loss is cross_entropy.
    """

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    forward_only: bool
    policy: Clipping | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all data."""
        return sum(len(datum.tokens) for datum in self.data)


def loss_message(content: bytes) -> Any:
    """Return a body of ``forward_backward`` as its message; ConfigError if it is none."""
    message: Any = MESSAGES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(content)
    except DecodeError:
        raise ConfigError(
            f"the body is no ForwardBackwardRequest of Tinker's protobuf ({CONTENT_TYPE})"
        ) from None
    return message


def read_loss_request(message: Any, vocab_size: int, max_tokens: int) -> LossRequest:
    """Return what a body of ``forward_backward`` asks for.

    Parameters
    ----------
    message
        The body, as `loss_message` returns it.
    vocab_size
        Tokens and labels are below.
    max_tokens
        The longest datum that some replica holds.

    Raises
    ------
    ConfigError
        With all that is wrong with it.
    """
    problems = Problems()
    if message.loss_fn not in LOSSES:
        known = ", ".join(LOSSES)
        problems.add(f"loss_fn {show(message.loss_fn)} is not offered here, want one of {known}")
    settings = CLIPPING if message.loss_fn == "ppo" else {}
    given = {name: entry.number for name, entry in message.loss_fn_config_v2.items()}
    if strange := ", ".join(sorted(given.keys() - settings.keys())):
        known = ", ".join(settings) or "none"
        problems.add(f"loss_fn_config: {strange}: this loss has the settings: {known}")
    if not message.data:
        problems.add("data: is empty")
    data = []
    for place, entry in enumerate(message.data):
        own = Problems()
        with own.noted():
            data.append(_datum(entry, message.loss_fn, vocab_size, max_tokens))
        problems += own.prefixed(f"data[{place}]: ")
    problems.raise_if_any()
    policy = None
    if message.loss_fn != "cross_entropy":
        policy = Clipping(*({**settings, **given}[name] for name in settings))
    return LossRequest(message.model_id, message.seq_id, tuple(data), message.forward_only, policy)


def _datum(message: Any, loss: str, vocab_size: int, max_tokens: int) -> Datum:
    problems = Problems()
    parts = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise ConfigError("model_input: only chunks of encoded text are read, no images")
        if len(chunk.encoded_text.tokens) % TOKEN_BYTES:
            raise ConfigError("model_input: want tokens of four bytes each")
        parts.append(np.frombuffer(chunk.encoded_text.tokens, dtype="<i4"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    wanted = LOSSES.get(loss, ())
    vectors = {}
    if "weights" in wanted:
        vectors["weights"] = np.ones(len(tokens))
    for name, tensor in message.loss_fn_inputs.items():
        with problems.noted():
            if wanted and name not in wanted:
                raise ConfigError(f"{name}: {loss} takes {', '.join(wanted)} only")
            vectors[name] = _vector(name, tensor)
    vectors = {name: vectors.get(name, np.zeros(0)) for name in wanted}
    if not len(tokens):
        problems.add("model_input: is empty")
    if len(tokens) > max_tokens:
        problems.add(
            f"has {len(tokens)} tokens, more than the {max_tokens} that any replica of this "
            f"deployment holds; send shorter ones"
        )
    for name, values in vectors.items():
        if len(values) != len(tokens):
            problems.add(f"{name}: has {len(values)} elements, want one per token: {len(tokens)}")
        if not np.isfinite(values).all():
            problems.add(f"{name}: want finite numbers")
    labels = vectors.get("target_tokens", np.zeros(0))
    for name, ids in (("model_input", tokens), ("target_tokens", labels)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            problems.add(f"{name}: tokens of this model are from 0 to {vocab_size - 1}")
    problems.raise_if_any()
    floats = {name: values.astype(np.float64) for name, values in vectors.items()}
    weights = floats.get("weights", floats.get("advantages", np.zeros(0)))
    return Datum(tokens.astype(np.int32), labels.astype(np.int32), weights, floats.get("logprobs"))


def _vector(name: str, tensor: Any) -> np.ndarray:
    """Return a tensor of one dimension."""
    if tensor.HasField("sparse_csr") or len(tensor.shape) > 1:
        raise ConfigError(f"{name}: want a dense tensor of one dimension, the tokens")
    if tensor.dtype not in DTYPES or len(tensor.dense) % DTYPES[tensor.dtype].itemsize:
        raise ConfigError(f"{name}: want elements of float32, int64 or int32")
    return np.frombuffer(tensor.dense, dtype=DTYPES[tensor.dtype])


def loss_output(logprobs: Sequence[FloatArray], loss: float) -> bytes:
    """Return the result of ``forward_backward``: each datum's logprobs, and the summed loss."""
    message: Any = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord")
    message.metrics["loss:sum"] = loss
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(logprobs))
    record.fields["logprobs"].CopyFrom(_batched(logprobs))
    content: bytes = message.SerializeToString(deterministic=True)
    return content


def sample_output(result: SampleResult) -> bytes:
    """Return the result of ``asample``."""
    message: Any = MESSAGES["SampleResponse"]()
    for sequence in result.sequences:
        message.sequences.add(
            stop_reason=STOPPED if sequence.is_stopped else TOO_LONG,
            tokens=np.array(sequence.tokens, dtype="<i4").tobytes(),
            logprobs=np.array(sequence.logprobs, dtype="<f4").tobytes(),
        )
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.astype("<f4").tobytes()
    content: bytes = message.SerializeToString(deterministic=True)
    return content


def _batched(vectors: Sequence[FloatArray]) -> Message:
    """Return vectors as one tensor, float32, with the byte offsets of each."""
    itemsize = DTYPES[FLOAT32].itemsize
    ends = np.cumsum([0, *map(len, vectors)], dtype="<i8") * itemsize
    data = np.concatenate([*vectors, np.zeros(0)]).astype(DTYPES[FLOAT32])
    return MESSAGES["BatchedTensor"](data=data.tobytes(), offsets=ends.tobytes(), dtype=FLOAT32)
