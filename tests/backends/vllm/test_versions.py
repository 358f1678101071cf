"""Requests that are under way while weights come: held meanwhile, and each token named after the weights it is of."""

import copy
import json
import threading
import time
from urllib.request import Request, urlopen

import pytest
import torch

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.hold import ASKED, VERSIONS
from spec_rollout.backends.vllm.server import Server
from spec_rollout.config import SpecConfig
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import PROMPTS, ROWS, needs_vllm, save_policy, teach
from tests.tiny import VOCAB, tokenizer

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman")]

LONG = 200
STRIDE = 300
"""Tokens of all rows together between two pushes."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    model = save_policy(folder / "policy", vocab_size=VOCAB)
    tokenizer().save_pretrained(folder / "policy")
    process = Process(folder / "policy", folder / "log")
    config = SpecConfig(max_slots=ROWS, num_speculative_tokens=3)
    yield VLLMBackend(model, config, lambda *_: Server(process.url, model.named_parameters, config, 600))
    process.kill()


def ask(server, prompt, **options):
    """The reply's only choice to one prompt, greedily continued."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": LONG, "temperature": 0.0, "ignore_eos": True}
    body |= {"return_token_ids": True, "logprobs": 0, **options}
    request = Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json", ASKED: "1"}
    )
    with urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]


def ask_all(server):
    """Threads that wait for a reply to each prompt, and what they have got."""
    choices = [None] * len(PROMPTS)

    def wait(i):
        choices[i] = ask(server, PROMPTS[i])

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    return threads, choices


def move(backend, size=0.03):
    noise = torch.Generator().manual_seed(backend.policy_version)
    with torch.no_grad():
        for weight in backend.model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=noise))
    backend.policy_version += 1


def drawn_by(policy, known, tokens, logprobs):
    """How many of `tokens` behind `known` are this policy's greedy ones, and the largest error of their log-probs."""
    with torch.no_grad():
        logits = policy(torch.tensor([known + tokens])).logits[0, len(known) - 1 : -1].double()
    took = torch.tensor(tokens)
    right = logits.argmax(-1) == took
    error = (logits.log_softmax(-1)[torch.arange(len(tokens)), took] - torch.tensor(logprobs)).abs()
    return int(right.sum()), float(error.max())


def test_each_token_of_a_completion_is_of_the_versions_that_it_names(backend):
    teach(backend)
    backend.deliver()
    server = backend.engine
    policies = {server.versions()[0]: copy.deepcopy(backend.model)}
    before = emitted(server.url)
    threads, choices = ask_all(server)
    while any(thread.is_alive() for thread in threads):
        if emitted(server.url) < before + STRIDE:
            continue
        before += STRIDE
        move(backend)
        backend.deliver()
        policies[server.versions()[0]] = copy.deepcopy(backend.model)
    crossed = 0
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        tokens, ranges = choice["token_ids"], choice[VERSIONS]
        assert len(tokens) == LONG and ranges[0][0] == 0
        starts = [first for first, *_ in ranges]
        assert starts == sorted(set(starts)) and starts[-1] < LONG
        crossed += len(ranges) - 1
        for (first, policy, draft), end in zip(ranges, [*starts[1:], LONG], strict=True):
            assert policy == draft
            known, own = prompt + tokens[:first], tokens[first:end]
            right, error = drawn_by(policies[policy], known, own, choice["logprobs"]["token_logprobs"][first:end])
            assert right == len(own) and error < 1e-3
    assert crossed


def test_nothing_is_drawn_in_a_push(backend, monkeypatch):
    backend.deliver()
    counts = []
    whole = Server._told

    def slowly(self, method, *arguments):
        whole(self, method, *arguments)
        if method == "live_begin":
            counts.append(emitted(self.url))
            time.sleep(1.0)
            counts.append(emitted(self.url))

    monkeypatch.setattr(Server, "_told", slowly)
    before = emitted(backend.engine.url)
    threads, choices = ask_all(backend.engine)
    while emitted(backend.engine.url) == before:
        pass
    move(backend)
    late = threading.Timer(0.5, lambda: choices.append(ask(backend.engine, [1, 2, 3], max_tokens=4)))
    late.start()
    backend.deliver()
    for thread in [*threads, late]:
        thread.join()
    assert counts[0] == counts[1] and counts[0] > 0
    version = backend.engine.versions()[0]
    assert choices[-1][VERSIONS] == [[0, version, version]]  # it came during the push
    assert any(len(choice[VERSIONS]) == 2 for choice in choices)


def emitted(url):
    with urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total"))
