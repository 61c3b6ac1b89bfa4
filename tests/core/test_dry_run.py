import numpy as np
import pytest
import tensorflow as tf

from dafne_federated.core.dry_run import _out_of_memory


def test_a_tensor_that_no_memory_holds_is_known_by_its_error() -> None:
    with pytest.raises(tf.errors.ResourceExhaustedError) as caught:
        tf.zeros((2**20, 2**20, 2**4)) + 1.0
    assert _out_of_memory(caught.value)


def test_other_backends_say_it_in_their_own_words() -> None:
    assert _out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating"))
    assert _out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))


def test_another_error_is_not_taken_for_it() -> None:
    with pytest.raises(ValueError, match="reshape") as caught:
        np.zeros(3).reshape(2, 2)
    assert not _out_of_memory(caught.value)
