"""Coupled verification inside vLLM: the tokens of the embedded engine, at any number of guesses."""

import pytest

from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.backends.vllm.tiny import PROMPTS, ROWS, make_backend, needs_vllm, runner, save_policy, teach
from tests.tiny import assert_same

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman")]

COLD = SamplingParams(max_new_tokens=40, temperature=0.15)
"""Cold enough that the head, which knows the greedy completions, is often right."""


class Cycle(FixedGamma):
    """Another number of guesses in each step."""

    def __init__(self, *numbers):
        super().__init__(max(numbers))
        self.numbers, self.steps = numbers, 0

    def choose(self, batch_size, context):
        self.steps += 1
        return self.numbers[self.steps % len(self.numbers)]


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """At up to 3 guesses, with a head that knows the greedy completions."""
    backend = make_backend(save_policy(tmp_path_factory.mktemp("policy")), num_speculative_tokens=3)
    teach(backend)
    return backend


@pytest.fixture
def draw(backend):
    """Draws with a controller, and says how far its guesses went."""

    def run(controller, params=COLD, seed=(1,), prompts=PROMPTS, **options):
        backend.controller, backend._watchman = controller, None
        backend.take_stats()
        drawn = backend.generate(prompts, params, seed=seed, **options)
        return drawn, backend.take_stats().mean_acceptance_length

    return run


def plain(backend, params=COLD, seed=(1,), prompts=PROMPTS, **options):
    return RolloutEngine(backend.model).generate(prompts, params, seed=seed, **options)


@pytest.mark.parametrize("numbers", [(0,), (1,), (3,), (3, 0, 1, 0, 0, 2)])
def test_any_number_of_guesses_draws_the_tokens_of_plain_decoding(backend, draw, numbers):
    prompts = PROMPTS * 2  # more than vLLM has rows for
    limits = [20 + i % 21 for i in range(len(prompts))]
    drawn, length = draw(Cycle(*numbers), prompts=prompts, max_new_tokens=limits)
    assert_same(drawn, plain(backend, prompts=prompts, max_new_tokens=limits))
    assert backend.engine.verification == "coupled" and len(prompts) > ROWS
    assert length > 1.5 or max(numbers) < 2


def test_a_prompt_that_is_read_in_pieces_draws_from_its_first_token_on(backend, draw, monkeypatch):
    """What its last piece samples has the noise of the first token, however few tokens it has."""
    scheduler = backend.engine.llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 8)
    params = SamplingParams(max_new_tokens=8)
    for length in range(9, 16):
        prompts = [list(range(1, length + 1))]
        for guesses in (0, 3):
            assert_same(draw(FixedGamma(guesses), params, prompts=prompts)[0], plain(backend, params, prompts=prompts))


def test_another_seed_and_other_keys_draw_other_tokens(backend, draw, monkeypatch):
    ids = [[c.token_ids for c in draw(FixedGamma(3), seed=(seed,))[0]] for seed in (1, 2, 1)]
    assert ids[0] == ids[2] and sum(map(list.__eq__, ids[0], ids[1])) < len(PROMPTS) / 4
    generate = backend.engine.generate
    shifted = lambda prompts, params, limits, keys: generate(prompts, params, limits, [*keys[1:], keys[0]])  # noqa: E731
    monkeypatch.setattr(backend.engine, "generate", shifted)
    assert sum(map(list.__eq__, ids[0], [c.token_ids for c in draw(FixedGamma(3))[0]])) < len(PROMPTS) / 4


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"eos_token_ids": (3, 50, 77, 101)},
    ],
    ids=str,
)
def test_every_option_is_that_of_our_own_sampler(backend, draw, options):
    params = SamplingParams(max_new_tokens=24, temperature=0.7, **options)
    drawn, length = draw(FixedGamma(3), params)
    assert_same(drawn, plain(backend, params))
    assert length > 1.05
    assert_same(draw(FixedGamma(0), params)[0], drawn)


def test_requests_that_are_sampled_in_unlike_ways_share_a_batch(backend):
    from vllm import SamplingParams as VLLMSamplingParams

    from spec_rollout.backends.vllm.engine import sampling_options
    from spec_rollout.backends.vllm.keyed_batch import keyed
    from spec_rollout.engine.noise import request_keys

    backend.generate(PROMPTS, COLD)
    ways = [SamplingParams(max_new_tokens=20, temperature=t, top_k=k) for t, k in ((0, 0), (0.5, 0), (1.0, 7))]
    keys = request_keys((5,), len(PROMPTS))
    given = [
        VLLMSamplingParams(
            **sampling_options(ways[i % 3], None, True, True), detokenize=False, extra_args=keyed([keys[i]], 0.0)
        )
        for i in range(len(PROMPTS))
    ]
    backend.engine.control(FixedGamma(2))
    rows = backend.engine.llm.generate([{"prompt_token_ids": p} for p in PROMPTS], given, use_tqdm=False)
    for way, params in enumerate(ways):
        expected = plain(backend, params, seed=(5,))
        found = [list(row.outputs[0].token_ids) for row in rows]
        assert found[way::3] == [c.token_ids for c in expected][way::3]


def test_a_request_without_a_key_is_drawn_by_its_seed_or_by_chance(backend):
    from vllm import SamplingParams as VLLMSamplingParams

    backend.generate(PROMPTS, COLD)
    drawn = [
        list(backend.engine.llm.generate([{"prompt_token_ids": [1, 2]}], p, use_tqdm=False)[0].outputs[0].token_ids)
        for p in [VLLMSamplingParams(max_tokens=30, detokenize=False, seed=seed) for seed in (7, 7, 8, None, None)]
    ]
    assert drawn[0] == drawn[1] and len({tuple(d) for d in drawn}) == 4


def test_near_ties_are_counted(backend, monkeypatch):
    coupled = backend.engine.llm.llm_engine.model_executor.driver_worker.worker.live_coupled
    monkeypatch.setattr(coupled, "_bound", 1e9)
    backend.controller, backend._watchman = FixedGamma(3), None
    backend.take_stats()
    drawn = backend.generate(PROMPTS, COLD)
    # what vLLM samples behind the end of a completion counts too
    assert backend.take_stats().near_ties >= sum(len(c.token_ids) for c in drawn)


def test_rejection_stays_available(backend, draw, monkeypatch):
    coupled = draw(FixedGamma(3))[0]
    monkeypatch.setattr(backend.engine, "verification", "rejection")
    backend.policy_version += 1
    ids = [c.token_ids for c in draw(FixedGamma(3))[0]]
    assert "_sample" not in vars(runner(backend)) and ids != [c.token_ids for c in coupled]
    assert backend.engine.versions()[0] > 0
    monkeypatch.undo()
    backend.policy_version += 1
    assert_same(draw(FixedGamma(3))[0], coupled)


def test_another_runner_is_refused_or_keeps_its_own_verification(backend, draw, monkeypatch):
    from spec_rollout.backends.vllm.coupled import Coupled

    with pytest.raises(ValueError, match=r"'coupled' was tested with .*cpu_model_runner.*verification='rejection'"):
        Coupled(object())
    backend.engine._call("live_verify", "rejection")
    monkeypatch.setattr("spec_rollout.backends.vllm.coupled.RUNNER", "another")
    assert backend.engine._call("live_verify", None) == "rejection"
    with pytest.raises(ValueError, match="'coupled' was tested"):
        backend.engine._call("live_verify", "coupled")


def test_a_head_that_rested_guesses_as_one_that_read_every_token(backend, draw, monkeypatch):
    """Greedy guesses of a row, after a stretch of steps without any."""
    head = backend.engine.llm.llm_engine.model_executor.driver_worker.worker.live_head
    found, read = {}, []
    propose = runner(backend).drafter.propose

    def kept(*given, num_speculative_tokens, **options):
        read.append(num_speculative_tokens)
        guesses = propose(*given, num_speculative_tokens=num_speculative_tokens, **options)
        if num_speculative_tokens:
            found[name].append(guesses.tolist())
        return guesses

    monkeypatch.setattr(runner(backend).drafter, "propose", kept)
    numbers = (0, 0, 0, 0, 0, 0, 0, 3)
    for name in ("resting", "reading"):
        if name == "reading":
            monkeypatch.setattr(runner(backend), "propose_draft_token_ids", head.propose)
        found[name], before = [], len(read)
        limits = [12 + 3 * i for i in range(len(PROMPTS))]  # rows leave meanwhile
        draw(Cycle(*numbers), SamplingParams(max_new_tokens=64, temperature=0), max_new_tokens=limits)
        passes = len(read) - before
        assert passes < 20 if name == "resting" else passes > 40
    assert len(found["resting"]) > 4 and found["resting"] == found["reading"]
