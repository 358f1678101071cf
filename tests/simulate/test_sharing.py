"""Ranks wait for the slowest; one that has finished may take over rows of another."""

from __future__ import annotations

import json
import statistics

import pytest

from spec_rollout import cli
from spec_rollout.gamma import CostModel, Measurement
from spec_rollout.simulate.cost_file import costs_to_json
from spec_rollout.simulate.replay import Costs, Decoding, Work, replay
from spec_rollout.simulate.sharing import phase
from tests.simulate.test_simulate import CELLS, rollout
from tests.tiny import PROMPTS

LINEAR = [Measurement("verify", rows, tokens, 64, 0.01 * rows * tokens) for rows in (1, 64) for tokens in (1, 64)]
"""Twice as many rows take twice as long."""
FLAT = [Measurement("verify", rows, tokens, 64, 0.01) for rows in (1, 64) for tokens in (1, 64)]
"""Weights that take as long to read for one row as for many."""
LONG, SHORT = Work([5] * 8, [100] * 8, range(8)), Work([5] * 8, [10] * 8, range(8))


def of(cells: list, **options) -> dict:
    return {"costs": Costs(CostModel(cells), **options), "slots": 8, "gamma": 0, "rates": []}


def test_ranks_wait_for_the_slowest():
    found = phase([LONG, SHORT], **of(CELLS))
    long, short = (replay(work, **of(CELLS)).seconds for work in (LONG, SHORT))
    assert found.seconds == long > short and found.moved == 0
    assert found.wait_s == pytest.approx((long - short) / 2) and found == phase([LONG, SHORT], **of(CELLS))


def test_a_rank_that_has_finished_takes_half():
    alone, shared = phase([LONG, SHORT], **of(LINEAR)), phase([LONG, SHORT], **of(LINEAR), sharing=True)
    # The second rank has finished after 10 of 100 steps; then each has 4 rows, and 4 are read again.
    step, again = 0.01 * 8, Costs(CostModel(LINEAR)).prefill_seconds([15] * 4)
    assert alone.seconds == pytest.approx(100 * step, rel=0.1)
    assert shared.seconds == pytest.approx(10 * step + again + 90 * step / 2, rel=0.1)
    assert shared.moved == 4 and 4 * 14 <= shared.reread <= 4 * 18


def test_it_brings_nothing_where_fewer_rows_take_as_long():
    alone, shared = (phase([LONG, SHORT], **of(FLAT), sharing=sharing) for sharing in (False, True))
    assert shared == alone


def test_nothing_is_drawn_before_it_was_let_go_of():
    giver, taker = (Decoding(work, **of(LINEAR)) for work in (LONG, SHORT))
    while not taker.done:
        taker.step()
    while giver.clock < 3 * taker.clock:
        giver.step()
    given = giver.give(2)
    taker.take(given, now=giver.clock)
    assert len(given) == 2 and taker.clock == giver.clock


@pytest.mark.parametrize("slots", [2, 8])
def test_every_token_is_drawn_once(slots, monkeypatch):
    ranks = []
    seen = "spec_rollout.simulate.sharing.Decoding"
    monkeypatch.setattr(seen, lambda *given: ranks.append(Decoding(*given)) or ranks[-1])
    works = [Work([5] * 6, [50, 3, 90, 7, 20, 60], range(6)), Work([9] * 6, [4] * 6, [0] * 6), SHORT]
    found = phase(works, **(of(LINEAR) | {"slots": slots}), sharing=True)
    drawn = sum(rank.stats.emitted for rank in ranks)
    assert drawn == sum(sum(work.completion_tokens) for work in works) and found.moved > 2
    assert found.wait_s == pytest.approx(statistics.mean(found.seconds - rank.clock for rank in ranks))


def test_traces_of_several_ranks_are_one_phase(tmp_path, capsys):
    files = [tmp_path / f"rank-{rank}.jsonl" for rank in (0, 1)]
    for path in files:
        rollout(4, 2, path)
    out, cost = tmp_path / "out.json", tmp_path / "cost.json"
    cost.write_text(json.dumps(costs_to_json(Costs(CostModel(CELLS)))))
    given = ["--json", str(out), "--cost", str(cost)]
    assert cli.main(["simulate", "--trace", *map(str, files), *given]) == 0
    (found,) = json.loads(out.read_text())["predictions"]
    assert (found["ranks"], found["batch_size"]) == (2, 2 * len(PROMPTS))
    assert found["wait_s"] >= 0 and found["shared_s"] > 0
    assert cli.main(["simulate", "--trace", str(files[1]), *given]) == 0
    (alone,) = json.loads(out.read_text())["predictions"]
    assert (alone["ranks"], alone["wait_s"], alone["shared_s"]) == (1, None, None)
    assert alone["plain_s"] == pytest.approx(found["plain_s"])  # each had the same
    assert "a rank waits" in capsys.readouterr().out
