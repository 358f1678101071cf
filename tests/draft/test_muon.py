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


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24)])
def test_a_stack_is_so_many_matrices(shape, emulated):
    """Of very different gradients: each is orthogonalised by itself, and one that has none stays where it is."""
    torch.manual_seed(0)
    stack, plain = (torch.nn.Parameter(torch.randn(size)) for size in (shape, (8, 8)))
    apart = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
    muon = Muon([stack, plain], lr=0.05)
    muon.emulated = emulated
    reference = torch.optim.Muon(apart, lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    start = stack.detach().clone()
    for _ in range(3):
        stack.grad = torch.randn(shape) * torch.tensor([1e-3, 1e3, 0.0])[:, None, None]
        plain.grad = torch.randn(8, 8)
        for matrix, grad in zip(apart, stack.grad, strict=True):
            matrix.grad = grad.clone()
        muon.step()
        reference.step()
    moved = (stack - start).flatten(1).norm(dim=1)
    assert (moved[:2] > 0.5).all() and moved[2] == 0
    assert ((stack - torch.stack(apart)).flatten(1).norm(dim=1) <= 0.02 * moved).all()
