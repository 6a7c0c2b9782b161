"""Messages are those of Tinker's client: its bytes are read, and bytes it reads are written."""

from __future__ import annotations

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.service.wire import loss_message, loss_output, read_loss_request

#: tinker 0.38.0: tokens 5 6 7, targets 6 7 300, weights 0 -1.5 1; request 3 of model m:train:0.
REQUEST = bytes.fromhex(
    "0a096d3a747261696e3a3010031a640a100a0e0a0c05000000060000000700000012300a0d7461726765745f746f"
    "6b656e73121f0a18060000000000000007000000000000002c010000000000001802220103121e0a07776569676874"
    "7312130a0c000000000000c0bf0000803f1801220103220d63726f73735f656e74726f7079"
)
FORWARD_ONLY = bytes.fromhex("3001")
#: protobuf, of the client's classes: logprobs -1 | -2 -3, loss:sum 2.5.
RESULT = bytes.fromhex(
    "0a0b41727261795265636f726412470a0b41727261795265636f726412360a086c6f6770726f6273122a0a0c0000"
    "80bf000000c0000040c01218000000000000000004000000000000000c00000000000000180118021a130a086c6f"
    "73733a73756d110000000000000440"
)


@pytest.mark.parametrize("forward_only", [False, True])
def test_what_the_client_writes_is_read(forward_only: bool) -> None:
    found = read_loss_request(loss_message(REQUEST + FORWARD_ONLY * forward_only), 301, 3)
    assert (found.model_id, found.seq_id, found.forward_only) == ("m:train:0", 3, forward_only)
    (datum,) = found.data
    np.testing.assert_array_equal(datum.tokens, [5, 6, 7])
    np.testing.assert_array_equal(datum.labels, [6, 7, 300])
    np.testing.assert_array_equal(datum.weights, [0.0, -1.5, 1.0])


def test_what_is_written_is_as_the_client_has_it() -> None:
    logprobs = [np.array([-1.0]), np.array([-2.0, -3.0])]
    assert loss_output(logprobs, 2.5) == RESULT


@pytest.mark.parametrize("place", range(len(REQUEST)))
def test_damaged_bytes_are_a_mistake_or_another_request(place: int) -> None:
    damaged = REQUEST[:place] + bytes([REQUEST[place] ^ 0x15]) + REQUEST[place + 1 :]
    try:
        found = read_loss_request(loss_message(damaged), 301, 3)
    except ConfigError:
        return
    assert all(len(datum.tokens) == len(datum.labels) for datum in found.data)


@pytest.mark.parametrize(("vocab", "longest", "words"), [(300, 3, "0 to 299"), (301, 2, "has 3")])
def test_what_the_model_cannot_take_is_refused(vocab: int, longest: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_loss_request(loss_message(REQUEST), vocab, longest)
