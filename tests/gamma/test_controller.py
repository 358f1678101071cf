"""The controller's single decisions, and its state."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from spec_rollout.gamma import AcceptanceModel, CostModel, FixedGamma, GammaController
from spec_rollout.gamma.controller import DWELL, MARGIN
from spec_rollout.records import StepStats
from tests.gamma.simulation import Machine, World


def exact_cost() -> CostModel:
    return Machine().calibrate(np.random.default_rng(0), noise=0.0)


def trained(rate: float) -> AcceptanceModel:
    model = AcceptanceModel()
    for _ in range(100):
        accepted = [round(1000 * rate**k) for k in range(1, 8)]
        model.observe(StepStats(1000, 7, 100, 0, accepted))
    return model


def quiet_world(rate: float, machine: Machine | None = None) -> World:
    return World(machine or Machine(), [rate] * 7, np.random.default_rng(0), noise=0.0, interruptions=0.0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64, 128])
def test_the_first_choice_is_the_best_goodput(rows, rate):
    world = quiet_world(rate)
    chosen = GammaController(exact_cost(), 7, trained(rate)).choose(rows, 512)
    assert world.goodput(rows, chosen, 512) >= 0.95 * world.best(rows, 512, 7)[1]  # the grid rounds off the kink


def test_acceptance_alone_does_not_decide():
    cost, acceptance = exact_cost(), trained(0.9)
    assert GammaController(cost, 7, acceptance).choose(1, 512) >= 5
    assert GammaController(cost, 7, acceptance).choose(128, 512) == 0


def test_without_a_draft_nothing_is_guessed_nor_probed():
    controller = GammaController(exact_cost(), 7, trained(0.9))
    controller.draft_ready = False
    world = quiet_world(0.9)
    world.run(controller, 1, 512, 300)
    assert set(world.gammas) == {0}
    assert controller.schedule(64, 512) == [(1, 64, 0)]
    controller.draft_ready = True
    assert controller.choose(1, 512) > 0


def test_a_bound_of_zero_is_plain_decoding():
    world = quiet_world(0.9)
    world.run(GammaController(exact_cost(), 0), 1, 512, 200)
    assert set(world.gammas) == {0}


def test_gains_below_the_margin_do_not_move_gamma():
    """At 4 rows γ = 6 is best up to a rate of 0.763 and γ = 7 above it, by less than 1 % up to 0.79."""
    world, controller = quiet_world(0.76), GammaController(exact_cost(), 7, trained(0.76))
    assert world.best(4, 512, 7)[0] == controller.choose(4, 512) == 6
    for rate in (0.79, 0.75) * 20:
        world.rates, controller.acceptance = [rate] * 7, trained(rate)
        world.run(controller, 4, 512, 1)
    assert world.best(4, 512, 7)[0] == 6 and quiet_world(0.79).best(4, 512, 7)[0] == 7
    probes = sum(gamma != 6 for gamma in world.gammas)
    assert probes <= 2 * DWELL  # of the two neighbours, once each


def test_another_batch_size_moves_gamma_at_once():
    controller = GammaController(exact_cost(), 7, trained(0.9))
    assert controller.choose(128, 512) == 0
    assert controller.choose(1, 512) >= 5
    assert controller.choose(128, 512) == 0


def test_probes_while_not_guessing_are_short_and_bounded():
    """Speculation never pays at 128 rows: probes may lose the purse of 3 steps, then 0.5 % of the time."""
    world = quiet_world(0.3)
    world.run(GammaController(exact_cost(), 7, trained(0.3)), 128, 512, 3000)
    probed = [gamma > 0 for gamma in world.gammas]
    assert 2 * DWELL <= sum(probed) < 0.03 * len(probed)
    runs = "".join("x" if p else " " for p in probed).split()
    assert all(2 <= len(run) <= DWELL for run in runs)
    lost = sum(world.spent) - sum(world.gained) / world.goodput(128, 0, 512)
    assert lost < 0.01 * sum(world.spent)


def test_a_probe_that_turns_out_dear_is_broken_off():
    """Guessing takes eight times as long as calibrated: the first probe spends the purse at once."""
    world = quiet_world(0.0, Machine(skew=lambda rows, tokens: 8.0 if tokens > 1 else 1.0))
    world.run(GammaController(exact_cost(), 7, trained(0.0)), 32, 512, 200)
    assert 0 < sum(gamma > 0 for gamma in world.gammas) < DWELL


def test_a_changed_draft_is_probed_soon():
    """At most one guess, whose time the first probe has measured: only the news is a reason to ask again."""
    world = quiet_world(0.0)
    controller = GammaController(exact_cost(), 1, trained(0.0))
    world.run(controller, 32, 512, 110)
    assert not any(world.gammas[-20:])
    controller.draft_changed()
    world.run(controller, 32, 512, DWELL)
    assert any(world.gammas[110:])


def test_old_evidence_cannot_drown_a_probe():
    """Thousands of rejected guesses are on record when the draft becomes perfect."""
    world = quiet_world(1.0)
    world.run(GammaController(exact_cost(), 7, trained(0.0)), 8, 512, 300)
    assert world.gammas[0] == 0 and all(gamma > 0 for gamma in world.gammas[-20:])


def test_old_evidence_counts_little_for_a_changed_draft():
    world = quiet_world(0.0)
    controller = GammaController(exact_cost(), 7, trained(0.95))
    controller.draft_changed()
    world.run(controller, 8, 512, 60)
    assert world.gammas[0] > 0 and world.gammas[-1] == 0


def test_an_interrupted_probe_does_not_stop_the_next():
    world = quiet_world(0.0)
    controller = GammaController(exact_cost(), 7, trained(0.0))
    for _ in range(200):
        stats = world.step(8, controller.choose(8, 512), 512)
        if stats.gamma and sum(gamma > 0 for gamma in world.gammas) == 2:
            stats.verify_s *= 100
        controller.observe(stats)
    assert any(world.gammas[20:])


def test_regret_is_what_a_step_lost_against_the_best_choice():
    world = quiet_world(0.9)
    controller = GammaController(exact_cost(), 7, trained(0.9))
    gammas = controller.choose(1, 128), 0, 3
    steps = [StepStats(1, gamma, 128, 0, []) for gamma in gammas]
    goodput = [world.goodput(1, gamma, 128) for gamma in gammas]
    expected = [1 - g / goodput[0] for g in goodput]
    assert controller.regrets(steps) == pytest.approx(expected, abs=0.01)
    assert expected[1] > 0.3 and expected[2] > 0.1 and controller.regrets([]) == []


def test_the_schedule_covers_every_batch_size_and_falls():
    controller = GammaController(exact_cost(), 7, trained(0.8))
    schedule = controller.schedule(256, 512)
    assert schedule[0][0] == 1 and schedule[-1][1] == 256
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(schedule))
    gammas = [gamma for _, _, gamma in schedule]
    assert gammas == sorted(gammas, reverse=True) and len(set(gammas)) == len(gammas) >= 4
    world = quiet_world(0.8)
    for first, last, gamma in schedule:
        middle = (first + last) // 2
        assert world.goodput(middle, gamma, 512) > 0.95 * world.best(middle, 512, 7)[1]
    json.dumps(schedule)


def test_the_schedule_changes_for_gains_above_the_margin_only():
    controller = GammaController(exact_cost(), 7, trained(0.8))
    schedule = controller.schedule(256, 512)
    for (_, last, gamma), (_, _, before) in itertools.pairwise(schedule):
        goodput = controller.acceptance.expected_curve(7) / controller.cost.step_seconds(last, 7, 512)[0]
        assert goodput[gamma] > (1 + MARGIN) * goodput[before]


def test_asking_for_the_schedule_changes_no_decision():
    asked, left = (GammaController(exact_cost(), 7, trained(0.8)) for _ in range(2))
    worlds = quiet_world(0.8), quiet_world(0.8)
    for _ in range(30):
        asked.schedule(64, 512)
        for controller, world in zip((asked, left), worlds, strict=True):
            world.run(controller, 12, 512, 1)
    assert worlds[0].gammas == worlds[1].gammas


@pytest.mark.parametrize("weights_s", [60e-3, 10 * 60e-3])
def test_the_costs_of_here_count_on_another_machine(weights_s):
    """What was learned of the draft goes on; what real steps took does where passes take alike."""
    saved, here = GammaController(exact_cost(), 7), Machine(weights_s=weights_s)
    quiet_world(0.9, Machine(skew=lambda rows, tokens: 1.5)).run(saved, 4, 512, 50)
    resumed = GammaController(here.calibrate(np.random.default_rng(0), noise=0.0), 7)
    fresh = resumed.cost.step_seconds(4, 7, 512)[0]
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    learned = saved.cost.step_seconds(4, 7, 512)[0]
    assert resumed.cost.step_seconds(4, 7, 512)[0] == pytest.approx(fresh if weights_s > 0.1 else learned)
    assert learned[3] > 1.3 * exact_cost().step_seconds(4, 7, 512)[0][3]
    assert resumed.acceptance.rates(7) == saved.acceptance.rates(7)


def test_a_saved_gamma_above_the_bound_is_cut():
    wide = GammaController(exact_cost(), 7, trained(0.9))
    wide.choose(1, 512)
    narrow = GammaController(exact_cost(), 2)
    narrow.load_state_dict(wide.state_dict())
    assert narrow.choose(1, 512) == 2


def test_bad_arguments_and_states_are_refused():
    with pytest.raises(ValueError, match="max_gamma=-1"):
        GammaController(exact_cost(), -1)
    with pytest.raises(ValueError, match="gamma=-2"):
        FixedGamma(-2)
    with pytest.raises(ValueError, match="start without it"):
        GammaController(exact_cost(), 7).load_state_dict({"cost": exact_cost().to_json()})


def test_fixed_gamma():
    controller = FixedGamma(3)
    controller.observe(StepStats(4, 3, 10, 4, [0, 0, 0]))
    controller.draft_changed()
    assert [controller.choose(rows, 10) for rows in (1, 64)] == [3, 3]
    assert controller.schedule(64, 512) == [(1, 64, 3)]
    controller.draft_ready = False
    assert controller.choose(1, 10) == 0
    again = FixedGamma(3)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.choose(1, 10) == 0
