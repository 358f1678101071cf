"""Who may ask a server for what; no server runs, but in the last test."""

import asyncio
import json
import re
from contextlib import nullcontext
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import save_file

from spec_rollout.backends.vllm import serve
from spec_rollout.backends.vllm.guard import Guard
from spec_rollout.backends.vllm.intake import FOLDER, Intake
from spec_rollout.backends.vllm.key import server_key
from spec_rollout.backends.vllm.server import Server
from spec_rollout.backends.vllm.weights_folder import claim
from spec_rollout.config import SpecConfig
from tests.backends.vllm.process import Process
from tests.backends.vllm.pushes import check_pushes, check_sent
from tests.backends.vllm.tiny import needs_vllm, save_policy
from tests.tiny import VOCAB, tokenizer

KEY = "a-key-of-many-letters"
RIGHT, WRONG = {"authorization": f"Bearer {KEY}"}, {"authorization": f"Bearer {KEY}."}
HERE = {"host": "127.0.0.1:8000"}
CALL = {"method": "live_versions"}


def status(path, headers, body=None, method="POST", kind="http"):
    """What the guard answers itself; None where the application behind it answers, which gets the body whole."""
    text, sent, reached = json.dumps(body).encode(), [], []
    parts = [text[:5], text[5:]]

    async def app(scope, receive, send):
        got = b""
        while True:
            message = await receive()
            got += message["body"]
            if not message.get("more_body"):
                break
        assert got == text
        reached.append(path)

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app)(scope, receive, send))
    assert bool(sent) != bool(reached) or kind == "websocket"
    return sent[0]["status"] if sent else (None if reached else "closed")


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/metrics", "/sleep"])
@pytest.mark.parametrize("headers", [HERE, HERE | WRONG, {"authorization": KEY}])
def test_without_the_key_nothing_is_answered(monkeypatch, path, headers):
    monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY)
    assert status(path, headers, CALL) == 401
    assert status(path, headers, CALL, method="OPTIONS") == 401


@pytest.mark.parametrize(
    ("path", "body", "found"),
    [
        ("/v1/completions", {}, None),
        ("/collective_rpc", CALL, None),
        ("/collective_rpc", {"method": "reload_weights"}, 403),
        ("/collective_rpc", ["live_versions"], 403),
        ("/sleep", None, 403),
        ("/init_weight_transfer_engine", None, 403),
        ("/v1", None, 403),
    ],
)
def test_with_the_key_weights_come_by_our_methods_only(monkeypatch, path, body, found):
    monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY)
    assert status(path, RIGHT, body) == found


def test_health_needs_no_key_and_websockets_are_closed(monkeypatch):
    monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY)
    assert status("/health", {}, method="GET") is None
    assert status("/v1/realtime", RIGHT, kind="websocket") == "closed"


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (HERE, None),
        ({"host": "localhost:8000"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "elsewhere.example"}, 403),
        ({}, 403),
        (HERE | {"origin": "http://elsewhere.example"}, 403),
    ],
)
def test_without_a_key_web_pages_are_refused(monkeypatch, headers, found):
    monkeypatch.delenv("SPEC_ROLLOUT_KEY", raising=False)
    assert status("/collective_rpc", headers, CALL) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"SPEC_ROLLOUT_KEY": "short"}, "SPEC_ROLLOUT_KEY holds 5 characters: .* at least 16"),
        ({"SPEC_ROLLOUT_KEY": KEY, "SPEC_ROLLOUT_KEY_FILE": "there"}, "both set"),
        ({"SPEC_ROLLOUT_KEY_FILE": "/not/there"}, "/not/there is no file"),
        ({"SPEC_ROLLOUT_KEY": "a key with spaces in it"}, "without spaces"),
    ],
)
def test_a_key_that_protects_nobody_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        server_key(given)


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_with_the_key_is_for_its_owner(tmp_path, mode):
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(mode)
    given = {"SPEC_ROLLOUT_KEY_FILE": str(file)}
    with nullcontext() if mode == 0o600 else pytest.raises(ValueError, match="chmod 600"):
        assert server_key(given) == KEY


@pytest.mark.parametrize(
    ("line", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, r"--host 0.0.0.0 .*set SPEC_ROLLOUT_KEY"),
        (["--host", "::"], {}, "set SPEC_ROLLOUT_KEY"),
        (["--host", "myserver"], {}, "set SPEC_ROLLOUT_KEY"),
        (["--api-key", "x"], {}, "--api-key can be read off the process list"),
        (["--api_key=x"], {}, "--api-key can be read off the process list"),
        ([], {"VLLM_API_KEY": "x"}, "VLLM_API_KEY covers /v1 only"),
        (["--uds", "x"], {}, "--uds"),
    ],
)
def test_serve_refuses_what_leaves_it_open(monkeypatch, capsys, line, environment, message):
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    monkeypatch.delenv("SPEC_ROLLOUT_KEY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert serve.main(["--policy", "nowhere", *line]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_for_weights_is_of_one_server(tmp_path):
    folder = tmp_path / "weights"
    with claim(folder):
        assert len((folder / "mark").read_text()) == 32
        with pytest.raises(ValueError, match="belongs to a server that runs"), claim(folder):
            pass
        (folder / "policy-1-0.safetensors").write_text("left behind")
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"), claim(folder):
        pass
    assert (folder / "thesis.txt").exists()
    (folder / "thesis.txt").unlink()
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="written to by others"), claim(folder):
        pass


def test_files_of_the_agreed_folder_only(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "outside-1-0.safetensors")
    (tmp_path / "weights" / "policy-1-1.safetensors").symlink_to(tmp_path / "outside-1-0.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "weights" / "policy-1-2.safetensors")
    worker = Intake()
    worker._open = {"policy": {"w": ["F32", [2]]}}
    outside = ("../outside-1-0.safetensors", str(tmp_path / "outside-1-0.safetensors"))
    for name in (*outside, "policy-1-0.safetensors", "policy-1-0.bin", "policy-1-1.safetensors"):
        assert "is no file of weights in" in worker.live_take("policy", name)[0]
    assert "announced was ['F32', [2]]" in worker.live_take("policy", "policy-1-2.safetensors")[0]
    assert worker._open == {"policy": {"w": ["F32", [2]]}}
    assert "1 announced weights have not come, among them w" in worker.live_finish("1")[0]


@needs_vllm
def test_a_server_with_a_key(tmp_path, monkeypatch):
    """On any address; all that was pushed lies in one folder, and a push that does not fit changes nothing."""
    model = save_policy(tmp_path / "policy", tie_word_embeddings=True, vocab_size=VOCAB)
    tokenizer().save_pretrained(tmp_path / "policy")
    monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY)
    options = ("--host", "0.0.0.0", "--num_speculative_tokens", "0", "--weights", str(tmp_path / "weights"))
    process = Process(tmp_path / "policy", tmp_path / "log", *options)
    try:
        process.wait()
        for path in ("/v1/models", "/collective_rpc", "/metrics", "/server_info"):
            with pytest.raises(HTTPError, match="401"):
                urlopen(Request(process.url + path, json.dumps(CALL).encode() if "rpc" in path else None))
        server = Server(process.url, model.named_parameters, SpecConfig(num_speculative_tokens=0), 60)
        check_pushes(server, tmp_path)
        check_sent(server, model, monkeypatch)
        monkeypatch.setenv("SPEC_ROLLOUT_KEY", KEY + ".")
        with pytest.raises(PermissionError, match="does not take this trainer's key: set SPEC_ROLLOUT_KEY"):
            Server(process.url, model.named_parameters, SpecConfig(num_speculative_tokens=0), 60)
    finally:
        process.kill()
