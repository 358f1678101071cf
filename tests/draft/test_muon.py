"""Muon gives the same updates with and without bfloat16."""

import copy

import pytest
import torch

from spec_rollout.draft.muon import Muon


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_float32_steps_are_those_of_torch(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    ours, theirs = weight, copy.deepcopy(weight)
    muon = Muon([ours], lr=0.05, weight_decay=0.1)
    muon.emulated = True
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = weight.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bfloat16 has 8 bits
    assert moved > 0.5
    assert muon.state_dict()["state"][0].keys() == reference.state_dict()["state"][0].keys()
