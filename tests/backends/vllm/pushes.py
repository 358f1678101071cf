"""What a server with a key makes of pushes that fit, that do not, and that come over HTTP."""

import pytest
import torch

from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import assert_same


def check_pushes(server, folder):
    names = server.policy
    server.load(None, 3)
    assert server.versions() == [3, 0]
    for version, weights, message in (
        (3, names, r"Version 3 is not above .* \[3, 0\]"),
        (4, lambda: [(name, w[:1]) for name, w in names()], "has the shape"),
        (4, lambda: list(names())[1:], "is missing"),
        (4, lambda: [*names(), ("another.weight", next(names())[1])], "has no another.weight"),
    ):
        server.policy, server.policy_shapes = weights, None
        with pytest.raises(RuntimeError, match=message):
            server.load(None, version)
        assert server.versions() == [3, 0]
    server.policy, server.policy_shapes = names, None
    outside = folder / "outside.safetensors"
    outside.write_text("")
    held, server._held = server._held, [9, 9]
    with pytest.raises(RuntimeError, match="another one pushes to it"):
        server.load(None, 4)
    server._held = held
    for name in ("../outside.safetensors", str(outside), "outside.pt", "policy-9-9.safetensors"):
        assert server._call("live_take", "policy", name) == [["No push of a policy has begun."]]
    server.load(None, 4)
    assert server.versions() == [4, 0] and [file.name for file in (folder / "weights").iterdir()] == ["mark"]


def check_sent(server, model, monkeypatch):
    """To a server whose folder the trainer does not see."""
    with monkeypatch.context() as patch:
        patch.setattr("spec_rollout.backends.vllm.server.MARK", "another")
        assert server._folder()[0] is None
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        server.load(None, 5)
        assert server.versions() == [5, 0]
        drawn = server.generate([[1, 2], [3]], SamplingParams(max_new_tokens=8, temperature=0))
    expected = RolloutEngine(model).generate([[1, 2], [3]], SamplingParams(max_new_tokens=8, temperature=0))
    assert_same(drawn, expected)
