"""The tests check the annotations of lmu_dist: types in all modules, shapes where they are annotated."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from lmu_dist.data.batches import Batch
from lmu_dist.scaling.laws import Chinchilla


def test_wrong_types_and_shapes_are_errors():
    law = Chinchilla(1, 1, 1, 1, 1)  # an int is a float
    assert law.loss([1.0, 2.0], 4).tolist() == [2.25, 1.75]
    with pytest.raises(BeartypeCallHintViolation, match="parameter E='1' violates"):
        Chinchilla("1", 1, 1, 1, 1)  # pyright: ignore
    with pytest.raises(BeartypeCallHintViolation):
        law.loss(1, {})  # pyright: ignore
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert Batch(ids, ids).inputs is ids
    with pytest.raises(TypeCheckError, match="targets"):
        Batch(ids, ids[:, :2])
    with pytest.raises(TypeCheckError, match="inputs"):
        Batch(ids.float(), ids)
