"""Pictures of rollouts and of training."""

from __future__ import annotations

from pathlib import Path

from spec_rollout.experiments.runs import Drift, Run

INK, ROWS, GUESSES, OURS, THEIRS = "#333333", "#9db8d2", "#d1495b", "#d1495b", "#66727c"


def draw_demo(path: Path, baseline: Run, plain: Run, ours: Run) -> None:
    """Three panels: one rollout through its steps, acceptance over training, and reward over wall time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "font.size": 10, "axes.edgecolor": INK, "text.color": INK})
    figure, (rollout, acceptance, reward) = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    _rollout(rollout, ours)
    lengths = [(i, s.mean_acceptance_length) for i, s in enumerate(ours.stats, start=1) if s.drafted]
    acceptance.plot(*zip(*lengths, strict=True), color=OURS, marker="o", markersize=3)
    acceptance.axhline(1, color=THEIRS, linewidth=1, linestyle=":")
    acceptance.set(title="The draft learns and follows", xlabel="GRPO step", ylim=(0.9, None))
    acceptance.set_ylabel("tokens per verify pass and row")
    for run, name, colour in (
        (baseline, "TRL's own sampler", THEIRS),
        (plain, "ours, plain", ROWS),
        (ours, "ours", OURS),
    ):
        elapsed = [sum(run.step_seconds[: i + 1]) for i in range(len(run.step_seconds))]
        reward.plot(elapsed[: len(run.rewards)], _smooth(run.rewards), label=name, color=colour)
    reward.set(title="The same learning, sooner", xlabel="seconds", ylabel="reward (mean of 5 steps)")
    reward.legend(frameon=False)
    for axis in (acceptance, reward):
        axis.spines["right"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_drift(path: Path, drift: Drift) -> None:
    """Two panels: acceptance length of the heads over training, and how far the policy moved."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from spec_rollout.experiments.probe import CEILING_PROMPTS, CEILING_STEPS

    plt.rcParams.update({"axes.spines.top": False, "font.size": 10, "axes.edgecolor": INK, "text.color": INK})
    figure, (lengths, moved) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for series, label, colour, style in (
        (drift.ceiling, f"a new head, {CEILING_STEPS} steps on {CEILING_PROMPTS} rollouts", INK, ":"),
        (drift.double, "refreshed, twice the time", ROWS, "-"),
        (drift.refreshed, "refreshed", OURS, "-"),
        (drift.cold, "refreshed, from a cold start", OURS, "--"),
        (drift.frozen, "frozen", THEIRS, "--"),
    ):
        lengths.plot(drift.steps, series, style, color=colour, marker="o", markersize=3, label=label)
    lengths.set(title="The head follows the policy", xlabel="GRPO step", ylim=(1, None))
    lengths.set_ylabel("tokens per verify pass and row, 3 guessed")
    lengths.legend(frameon=False)
    moved.plot(drift.steps, drift.policy_kl, color=OURS, marker="o", markersize=3)
    moved.set(title="How far the policy moved", xlabel="GRPO step", ylim=(0, None))
    moved.set_ylabel("KL to the first policy, nats per token", color=OURS)
    right = moved.twinx()
    right.plot(drift.steps, drift.probe_reward, color=THEIRS, marker="o", markersize=3)
    right.set(ylim=(0, 1))
    right.set_ylabel("reward on held-out problems", color=THEIRS)
    lengths.spines["right"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _rollout(axis, ours: Run) -> None:
    steps = ours.stats[-1].steps
    seconds = [sum(s.seconds for s in steps[: i + 1]) for i in range(len(steps))]
    axis.fill_between(seconds, [s.rows for s in steps], step="post", color=ROWS, linewidth=0)
    axis.set(title="One rollout: rows that finish, and how far is guessed", xlabel="seconds", ylim=(0, None))
    axis.set_ylabel("active rows", color="#5b7fa3")
    guesses = axis.twinx()
    guesses.plot(seconds, [s.gamma for s in steps], drawstyle="steps-post", color=GUESSES, linewidth=1.5)
    guesses.set_ylabel("tokens guessed per row", color=GUESSES)
    guesses.yaxis.get_major_locator().set_params(integer=True)
    guesses.set_ylim(0, max(1, *(s.gamma for s in steps)) + 0.5)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]
