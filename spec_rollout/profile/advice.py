"""What to change, in words, each with the figure behind it."""

from __future__ import annotations

from collections.abc import Sequence

from spec_rollout.backends.trace import NGRAMS, RolloutTrace
from spec_rollout.gamma import AcceptanceModel
from spec_rollout.simulate.replay import Costs, Work, replay

WORTH = 0.05
"""Gains below this share are not worth a word."""
BETTER = 0.05
"""Rise of every acceptance rate that longer training of the draft is asked about."""
LARGE_SHARE = 0.3


def advise(
    figures: dict, traces: Sequence[RolloutTrace], costs: Costs, rates: Sequence[float], draft: AcceptanceModel
) -> list[dict]:
    """Sentences, the most telling first; `figures` are those of profile.json so far."""
    adaptive = [row for row in figures["throughput"] if row["sampler"] == "adaptive" and row["speedup_vs_plain"]]
    rows = figures["throughput"]
    found = [_speed(adaptive), _where(figures.get("rollout")), _fixed(rows), _earlier(rows)]
    tails = [t for t in traces if t.labels["sampler"] == "adaptive"]
    if tails:
        largest = max(tails, key=lambda t: t.slots)
        found += [_better_draft(largest, costs, rates, draft), _slots(largest, costs, rates, draft)]
    found += [_split(figures["time_split"]), _limit(figures["limits"]), _memory(figures["memory"])]
    return [item for item in found if item is not None]


def _item(text: str, **figures: float) -> dict:
    return {"text": text, "figures": figures}


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _speed(adaptive: list[dict]) -> dict | None:
    if not adaptive:
        return None
    best = max(adaptive, key=lambda row: row["speedup_vs_plain"])
    last = adaptive[-1]
    text = (
        f"Speculation pays most at {_rows(best['batch_size'])}: {best['speedup_vs_plain']:.2f}\u00a0× plain decoding; "
        f"at {_rows(last['batch_size'])}, the largest batch measured, {last['speedup_vs_plain']:.2f}\u00a0×."
    )
    if last["speedup_vs_plain"] < 1 and best["speedup_vs_plain"] > 1 + WORTH:
        text += f" Fewer slots (max_slots: {best['batch_size']}) keep more of the rollout where it pays."
    return _item(text, best=best["speedup_vs_plain"], largest_batch=last["speedup_vs_plain"])


def _where(rollout: dict | None) -> dict | None:
    """At which part of a rollout guesses were made."""
    if rollout is None:
        return None
    guessing = [rows for rows, gamma in zip(rollout["rows"], rollout["gamma"], strict=True) if gamma]
    share = len(guessing) / len(rollout["rows"])
    if guessing and max(guessing) == rollout["batch_size"]:
        return None
    if not guessing:
        return _item(
            f"At {_rows(rollout['batch_size'])} no step carried a guess: the draft does not pay yet. Let it learn "
            "longer (draft_overhead), or give one made ahead (spec-rollout pretrain-draft).",
            share=0.0,
        )
    return _item(
        f"At {_rows(rollout['batch_size'])} speculation ran in {share:.0%} of the steps, at {_rows(max(guessing))} or "
        "fewer: the larger the batch, the less spare arithmetic there is.",
        share=share,
        rows=max(guessing),
    )


def _fixed(throughput: list[dict]) -> dict | None:
    """A fixed γ that beat the controller beyond what the turns differ by."""
    for row in reversed(throughput):
        rivals = [r for r in throughput if r["batch_size"] == row["batch_size"] and r["sampler"] == "fixed"]
        if row["sampler"] != "adaptive" or not rivals:
            continue
        best = max(rivals, key=lambda r: r["tokens_per_s"])
        gain = best["tokens_per_s"] / row["tokens_per_s"] - 1
        if row["turns"] > 1 and best["tokens_per_s_min"] > row["tokens_per_s_max"] and gain > WORTH:
            return _item(
                f"At {_rows(row['batch_size'])} num_speculative_tokens: {best['gamma']} drew {gain:.0%} more tokens "
                "per second than the adaptive number. Measure longer (--seconds) before you fix it: it then holds for "
                "every batch size.",
                gain=gain,
            )
    return None


def _earlier(throughput: list[dict]) -> dict | None:
    """What guesses bring that need no training."""
    table = [row for row in throughput if row["sampler"] == NGRAMS and row["speedup_vs_plain"]]
    if not table:
        return None
    best = max(table, key=lambda row: row["speedup_vs_plain"])
    pays = best["speedup_vs_plain"] > 1
    end = "they serve until the draft is predicted to be faster" if pays else "here they do not pay"
    return _item(
        f"Guesses from earlier rollouts, which need no training, reach {best['speedup_vs_plain']:.2f}\u00a0× plain "
        f"decoding at {_rows(best['batch_size'])}: {end}.",
        speedup=best["speedup_vs_plain"],
        acceptance_length=best["mean_acceptance_length"],
    )


def _better_draft(trace: RolloutTrace, costs: Costs, rates: Sequence[float], draft: AcceptanceModel) -> dict | None:
    now = replay(Work.of(trace), costs, trace.slots, None, rates, draft).seconds
    raised = [min(rate + BETTER, 0.99) for rate in rates]
    then = replay(Work.of(trace), costs, trace.slots, None, raised, None).seconds
    gain = 1 - then / now
    if gain < WORTH:
        return None
    return _item(
        f"The first guess comes true {rates[0]:.0%} of the time. Were every acceptance rate {BETTER} higher, a "
        f"rollout of {len(trace.group)} would take {gain:.0%} less: more training of the draft (draft_overhead) may "
        "pay.",
        first_guess=float(rates[0]),
        gain=gain,
    )


def _slots(trace: RolloutTrace, costs: Costs, rates: Sequence[float], draft: AcceptanceModel) -> dict | None:
    """Which number of slots would serve four times as many completions best, of those that were measured."""
    work = Work.of(trace).resized(4 * len(trace.group))
    seconds = {
        slots: replay(work, costs, slots, None, rates, draft).seconds
        for slots in sorted({max(1, trace.slots // 4), max(1, trace.slots // 2), trace.slots})
    }
    best = min(seconds, key=seconds.get)
    gain = seconds[min(seconds)] / seconds[best]
    return _item(
        f"{len(work.group)} completions like these would take {seconds[best]:.1f} s with max_slots: {best}, the best "
        f"of {', '.join(map(str, seconds))} (predicted; {gain:.2f}\u00a0× as fast as with {min(seconds)}).",
        slots=best,
        seconds=seconds[best],
    )


def _split(rows: list[dict]) -> dict | None:
    last = rows[-1] if rows else None
    if last is None or last["sampler"] != "adaptive":
        return None
    parts = {name: last[name] for name in ("prefill", "draft", "sampling", "host")}
    name = max(parts, key=parts.get)
    if parts[name] < LARGE_SHARE:
        return _item(
            f"At {_rows(last['batch_size'])} {last['verify']:.0%} of the time goes to the policy itself; "
            f"{name} comes next with {parts[name]:.0%}.",
            verify=last["verify"],
            share=parts[name],
        )
    remedy = {
        "prefill": "longer completions or more of them per prompt spread it",
        "draft": "a lower max_num_speculative_tokens bounds it",
        "sampling": "it grows with the vocabulary and the number of guesses",
        "host": "larger batches spread it over more tokens",
    }[name]
    text = f"At {_rows(last['batch_size'])} {name} takes {parts[name]:.0%} of the time: {remedy}."
    return _item(text, share=parts[name])


def _limit(limits: dict) -> dict | None:
    rows = [row for row in limits["passes"] if row["gamma"] == 0]
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    return _item(
        f"The policy's passes reach {last['share']:.0%} of what this device's bandwidth and arithmetic allow at "
        f"{_rows(last['rows'])}, {first['share']:.0%} at {first['rows']}; the rest is overhead of many small "
        "operations.",
        share_largest=last["share"],
        share_smallest=first["share"],
    )


def _memory(memory: dict[str, int]) -> dict | None:
    total = sum(memory.values())
    draft = memory.get("draft", 0) + memory.get("features", 0) + memory.get("draft_training", 0)
    if draft <= LARGE_SHARE * total:
        return None
    return _item(
        f"The draft with its features and its training holds {draft / 2**20:.0f} MiB, {draft / total:.0%} of the "
        "memory counted here; a lower max_feature_tokens bounds the features.",
        share=draft / total,
    )
