"""Files of weights that are sent to a server; no server runs."""

import asyncio

from spec_rollout.backends.vllm.guard import Guard
from spec_rollout.backends.vllm.intake import FOLDER
from tests.backends.vllm.test_guard import KEY, RIGHT


def put(name, parts, folder, monkeypatch, last="http.request"):
    """What the guard answers to a file that is sent to it."""
    monkeypatch.setenv(FOLDER, str(folder))
    sent, parts = [], list(parts)

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request" if parts else last, "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "PUT", "path": f"/weights/{name}"}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in RIGHT.items()]
    asyncio.run(Guard(None)(scope, receive, send))
    return sent[0]["status"]


def test_a_file_that_is_sent_replaces_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY)
    (tmp_path / "mark").write_text("m")
    for number in (0, 1):
        assert put(f"policy-1-{number}.safetensors", [b"ab", b"", b"c"], tmp_path, monkeypatch) == 201
        assert sorted(f.name for f in tmp_path.iterdir()) == ["mark", f"policy-1-{number}.safetensors"]
    assert (tmp_path / "policy-1-1.safetensors").read_bytes() == b"abc"


def test_what_is_no_whole_file_of_weights_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY)
    for name in ("../policy-1-0.safetensors", "mark", "policy-1-0.pt", ""):
        assert put(name, [b"a"], tmp_path, monkeypatch) == 403
    assert put("policy-1-0.safetensors", [b"a", b"b"], tmp_path, monkeypatch, last="http.disconnect") == 413
    assert put("policy-1-0.safetensors", [b"a"], tmp_path / "missing", monkeypatch) == 507
    monkeypatch.setattr("spec_rollout.backends.vllm.upload.LARGEST", 3)
    assert put("policy-1-0.safetensors", [b"ab", b"cd"], tmp_path, monkeypatch) == 413
    monkeypatch.delenv("SPEC_ROLLOUT_KEY")
    assert put("policy-1-0.safetensors", [b"a"], tmp_path, monkeypatch) == 403
    assert list(tmp_path.iterdir()) == []
