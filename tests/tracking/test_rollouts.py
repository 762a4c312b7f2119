"""A recorded rollout is plain JSON, and says which weights sampled which tokens."""

import json

import numpy as np

from rlsys.batch.versions import GIVEN, WeightVersion
from rlsys.tracking.rollouts import rollout_row


def test_versions_are_runs_of_tokens():
    versions = [WeightVersion(1, 4).packed()] * 2 + [GIVEN] + [WeightVersion(1, 5).packed()]
    row = rollout_row(
        uid="7@0",
        sample_index=np.int64(3),
        prompt="1+1=",
        response="2",
        prompt_ids=np.array([1, 2]),
        response_ids=np.array([3, 4, 5, 6]),
        response_mask=np.array([True, True, False, True]),
        logprobs=np.array([-0.1, -0.2, 0.0, -0.12345678], dtype=np.float32),
        versions=np.array(versions),
        finish_reason="stop",
        reward=np.float32(1.0),
        scores={"exact": 1.0, "length": None},
    )
    assert json.loads(json.dumps(row)) == row
    assert row["weight_versions"] == [
        {"lineage": 1, "step": 4, "tokens": 2},
        {"lineage": None, "step": None, "tokens": 1},
        {"lineage": 1, "step": 5, "tokens": 1},
    ]
    assert row["response_mask"] == [1, 1, 0, 1]
    assert row["rollout_logprobs"] == [-0.1, -0.2, 0.0, -0.1234568]
