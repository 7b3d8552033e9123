"""Arrays on their way between processes."""

import multiprocessing
import threading

import numpy as np
import pytest

from nnunetv2_diffusion import workers
from nnunetv2_diffusion.workers import receive_array, send_array


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1),
        np.zeros((0, 3), np.float32),
        np.float64(3.5).reshape(()),
    ],
    ids=["plain", "transposed", "empty", "scalar"],
)
def test_an_array_arrives_as_it_is_in_pieces(array, monkeypatch):
    monkeypatch.setattr(workers, "PIECE", 7)
    theirs, ours = multiprocessing.Pipe()
    sender = threading.Thread(target=send_array, args=(theirs, array))
    sender.start()
    found = receive_array(ours)
    sender.join()
    np.testing.assert_array_equal(found, array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)


def test_a_sender_that_is_gone_is_told():
    theirs, ours = multiprocessing.Pipe()
    theirs.send(((2, 2), "<f4"))
    theirs.close()
    with pytest.raises(EOFError):
        receive_array(ours)
