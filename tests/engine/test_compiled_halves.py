"""Compiled halves of layers: once for all layers and sizes, on live weights, and the same tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.compiled import NotCompilableError
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.lean import compiled_pass, programs
from spec_rollout.engine.lean.halves import module_of
from spec_rollout.engine.lean.programs import Programs
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.engine.test_lean import VARIANTS, rough
from tests.tiny import PROMPTS, Scripted, assert_same, reference

PARAMS = SamplingParams(max_new_tokens=16)


class Uncompiled(Programs):
    """Hands out what would be compiled, as it is: the same functions of the same arguments."""

    def __init__(self):
        super().__init__()
        self.made = []

    def get(self, forms, folder, wait, begin=True):
        self.made += [form for form in forms if form not in self._loaded]
        for form in forms:
            self._loaded.setdefault(form, self.flat(form))
        return {form: self._loaded[form] for form in forms}

    def flat(self, form):
        module, count = module_of(form), len(form.shapes)

        def program(given):
            assert all(tensor.is_contiguous() for tensor in given)
            found = module(*given[:-count], given[-count:])
            given.clear()
            return list(found) if isinstance(found, tuple) else [found]

        return program


@pytest.fixture
def uncompiled(monkeypatch) -> Uncompiled:
    made = Uncompiled()
    for place in ("spec_rollout.engine.lean.choice", "spec_rollout.draft.lean_head"):
        monkeypatch.setattr(f"{place}.PROGRAMS", made)
    return made


def engine_of(model, drafter=None, controller=None, **options) -> RolloutEngine:
    config = SpecConfig(max_slots=3, compile_passes=True, **options)
    return RolloutEngine(model, config, drafter=drafter, controller=controller)


@pytest.mark.parametrize("columns", [False, True], indirect=True)
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_are_the_same_when_it_comes_and_goes(name, columns, uncompiled, monkeypatch):
    """Between the compiled pass, the lean one and the model's own forward, in mid-rollout."""
    model = rough(name)
    expected = reference(model, PROMPTS, PARAMS)
    engine = engine_of(model, OracleDrafter(expected), Scripted(3, 0, 7, 1))
    taken, forward, lean = [], Target.forward, compiled_pass.LeanPass.__call__

    def in_turns(self, *given, **options):
        compiled, turn = self._lean, len(taken) % 3
        taken.append(self.path)
        if turn == 0:
            self._lean = None
        elif turn == 1 and compiled is not None:
            self._lean = lambda *read: lean(compiled, *read)
        found = forward(self, *given, **options)
        self._lean = compiled
        return found

    monkeypatch.setattr(Target, "forward", in_turns)
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert taken[-1] == "lean compiled" and engine.stats.mean_acceptance_length > 2


def test_one_program_serves_all_layers_and_sizes(uncompiled):
    model = rough("qwen3", num_hidden_layers=6)
    engine = engine_of(model, OracleDrafter(reference(model, PROMPTS, PARAMS)), Scripted(3, 0, 7, 1, 2))
    for count in (7, 1, 4):
        engine.generate(PROMPTS[:count], PARAMS)
    assert len(uncompiled.made) == 2


def head_of(model, **options) -> EagleDrafter:
    head = EagleHead(HeadConfig.for_target(model.config))
    drafter = EagleDrafter(head.eval(), PolicyView(model), **options)
    drafter.ready = True
    return drafter


def kinds(engine, drafter) -> set[str]:
    """The names of the passes of `drafter` that later steps of `engine` take."""
    found: set[str] = set()
    engine.progress = lambda *_: found.add(type(drafter.lean).__name__)
    return found


@pytest.mark.parametrize("columns", [False, True], indirect=True)
def test_the_head_guesses_the_same(columns, uncompiled):
    model = rough("qwen3")
    found = []
    for compiled in ("false", "true"):
        drafter = head_of(model, compiled=compiled)
        engine = RolloutEngine(model, SpecConfig(max_slots=3), drafter=drafter, controller=Scripted(3, 0, 7, 1))
        leans = kinds(engine, drafter)
        found.append(engine.generate(PROMPTS, PARAMS))
        assert (leans == {"CompiledHead"}) == (compiled == "true") and not engine.stats.drafter_failures
    assert [c.num_accepted for c in found[0]] == [c.num_accepted for c in found[1]]
    assert_same(*found)


def test_an_optimiser_step_is_seen_at_once(uncompiled):
    model = rough("gemma3_text")
    engine = engine_of(model)
    first = engine.generate(PROMPTS, PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in first] != [c.token_ids for c in second] and engine.target.path == "lean compiled"
    assert_same(second, reference(model, PROMPTS, PARAMS))


def test_what_computes_something_else_is_not_taken(uncompiled, monkeypatch):
    honest = compiled_pass.CompiledLayer.attend
    monkeypatch.setattr(
        compiled_pass.CompiledLayer,
        "attend",
        lambda self, q, kept, mask, shape: honest(self, q * 1.001, kept, mask, shape),
    )
    monkeypatch.setattr(Target, "_take_whole", lambda self, state: None)
    model = rough("qwen3")
    engine = engine_of(model)
    with pytest.warns(RuntimeWarning, match="lean compiled decode pass differs from Qwen3"):
        got = engine.generate(PROMPTS, PARAMS)
    assert_same(got, reference(model, PROMPTS, PARAMS))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_no_compiler(name, monkeypatch, tmp_path):
    def fails(form, path):
        log = tmp_path / "log"
        with log.open("wb") as out:
            command = [sys.executable, "-c", "import sys; sys.exit('no compiler here')"]
            return subprocess.Popen(command, stderr=out), log

    fresh = Programs()
    monkeypatch.setattr(programs, "_start", fails)
    monkeypatch.setattr("spec_rollout.engine.lean.choice.PROGRAMS", fresh)
    engine = engine_of(rough(name), calibration_cache=str(tmp_path))
    for _ in range(2):  # the second time it is known
        with pytest.raises(NotCompilableError, match="cannot compile .*no compiler here.* C\\+\\+ compiler"):
            engine.generate(PROMPTS[:1], PARAMS)


class Slow(Uncompiled):
    """Is asked `after` times before it is done."""

    def __init__(self, after):
        super().__init__()
        self.after, self.asked = after, []

    def get(self, forms, folder, wait, begin=True):
        assert not wait
        self.asked.append(begin)
        return super().get(forms, folder, wait) if begin and self.asked.count(True) > self.after else None


def test_auto_waits_for_nothing(monkeypatch):
    """It begins once rollouts have taken their time, and is taken when it is there: policy and head."""
    made = Slow(2)
    for place in ("spec_rollout.engine.lean.choice", "spec_rollout.draft.lean_head"):
        monkeypatch.setattr(f"{place}.PROGRAMS", made)
    monkeypatch.setattr("spec_rollout.engine.target.REPAYS_S", 1e9)
    model, paths = rough("qwen3"), []
    expected = reference(model, PROMPTS, PARAMS)
    drafter = head_of(model, compiled="auto")
    config = SpecConfig(max_slots=3, compile_passes="auto")
    engine = RolloutEngine(model, config, drafter=drafter, controller=Scripted(3, 0, 7, 1))
    for seconds in (1e9, 1e9, 0.0, 0.0, 0.0, 0.0):
        monkeypatch.setattr("spec_rollout.engine.target.REPAYS_S", seconds)
        leans = kinds(engine, drafter)
        assert_same(engine.generate(PROMPTS, PARAMS), expected)
        paths.append((engine.target.path, *leans))
    assert paths[:4] == [("lean", "LeanHead")] * 4 and paths[-1] == ("lean compiled", "CompiledHead")
    assert not any(made.asked[:2]) and not engine.stats.drafter_failures


def test_auto_without_a_compiler(monkeypatch):
    class Failing(Programs):
        def get(self, forms, folder, wait, begin=True):
            raise programs.CannotCompileError("no compiler here")

    monkeypatch.setattr("spec_rollout.engine.lean.choice.PROGRAMS", Failing())
    model = rough("qwen3")
    engine = RolloutEngine(model, SpecConfig(compile_passes="auto"))
    with pytest.warns(RuntimeWarning, match="no compiler here.*decoded without") as told:
        for _ in range(3):
            engine.generate(PROMPTS, PARAMS)
    assert len(told) == 1 and engine.target.path == "lean"


def test_by_the_compiler(tmp_path):
    """In the background, once for any number of rows and guesses, and kept for the next process."""
    model = rough("qwen3", num_hidden_layers=2)
    expected = reference(model, PROMPTS, PARAMS)
    lean = compiled_pass.LeanPass(model, compiled_pass.Family())
    found = compiled_pass.halves_of_model(model, compiled_pass.Family(), lean)
    forms = {half.form for pair in found for half in pair}
    assert programs.PROGRAMS.get(forms, str(tmp_path), wait=False) is None  # it has begun, and this does not wait
    controller = Scripted(3, 0, 7, 1, 2)
    engine = engine_of(model, OracleDrafter(expected), controller, calibration_cache=str(tmp_path))
    for count in (7, 1, 4):
        assert_same(engine.generate(PROMPTS[:count], PARAMS), expected[:count])
        assert engine.target.path == "lean compiled"
    assert engine.stats.mean_acceptance_length > 2
    assert {step.rows for step in engine.stats.steps} >= {1, 3} and len(list(tmp_path.rglob("*.pt2"))) == 2
    assert Programs().get(forms, str(tmp_path), wait=False).keys() == forms  # from the disk
