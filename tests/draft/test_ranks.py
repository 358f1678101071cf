"""Two processes train one head: each on its own rollouts, bit for bit the same."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft import ranks, refresh
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, make_policy

PARAMS = SamplingParams(max_new_tokens=24, temperature=0.3, eos_token_ids=(4,))


def backend():
    return EmbeddedBackend(make_policy("llama"), SpecConfig(num_speculative_tokens=3, draft_overhead=1e9))


def one_round(mine, rank, turn):
    """Uneven work: the second rank has fewer prompts, and they finish at other lengths."""
    mine.generate(PROMPTS[: 7 - 3 * rank] * 3, PARAMS, seed=(rank, turn))
    return mine.refresh(1e9)


def trains_as_one(rank):
    mine = backend()
    steps = [one_round(mine, rank, turn).steps for turn in range(3)]
    everyone = [None, None]
    dist.all_gather_object(everyone, (steps, {n: p.tolist() for n, p in mine.learner.head.state_dict().items()}))
    assert min(steps) > 0 and everyone[0] == everyone[1]
    mine.take_stats()
    mine.generate(PROMPTS * 4, PARAMS, seed=(rank, 9))
    assert mine.stats.mean_acceptance_length > 1.1


def notices_a_difference(rank):
    mine = backend()
    one_round(mine, rank, 0)
    assert not ranks.differ(mine.learner.head)
    with torch.no_grad():
        mine.learner.head.fc.weight[0, 0] += 1e-6 * rank
    assert ranks.differ(mine.learner.head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine.learner._agree()
    assert not ranks.differ(mine.learner.head) and "all take rank 0's" in str(caught[0].message)


def a_bad_gradient_on_one_rank_stops_both(rank):
    mine = backend()
    one_round(mine, rank, 0)
    mine.generate(PROMPTS, PARAMS, seed=(rank, 1))
    if rank == 1:
        for sample in mine.learner.buffer.samples:
            sample.features.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="learns again from new weights"):
        assert mine.refresh(1e9).steps == 0
    assert not mine.drafter.ready and not ranks.differ(mine.learner.head)


def counts_tokens_together(rank):
    from spec_rollout.draft import vocabulary
    from spec_rollout.draft.features import Sample
    from spec_rollout.draft.policy_view import PolicyView

    vocabulary.DRAFT_VOCABULARY = 4
    tokens = torch.tensor([[40, 41, 41, 41], [40, 50, 50, 50]][rank])
    chosen = vocabulary.choose_vocabulary([Sample(tokens, torch.zeros(3, 1), 1, 0)], PolicyView(make_policy("llama")))
    assert chosen.tolist() == [0, 40, 41, 50]


TASKS = (trains_as_one, notices_a_difference, a_bad_gradient_on_one_rank_stops_both, counts_tokens_together)


def _run(rank, meeting):
    torch.set_num_threads(1)
    refresh.MAX_EPOCHS = 20
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for task in TASKS:  # in one pair of processes: starting it takes longer than they do
        task(rank)
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    mp.spawn(_run, (tmp_path / "meeting",), nprocs=2)
