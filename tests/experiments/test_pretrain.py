"""A head made ahead of a run, from a policy on disk and a file of prompts."""

import json

import pytest

from spec_rollout import cli
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.records import SamplingParams
from tests.training.conftest import build_policy, build_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = build_tokenizer()
    build_policy(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    chat = [{"role": "user", "content": "count"}]
    prompts = [{"prompt": prompt} for prompt in ([{"role": "user", "content": "a b"}], chat)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return tmp_path


def test_the_head_is_made_and_taken_up(folder, capsys):
    line = f"pretrain-draft --policy {folder}/policy --prompts {folder}/prompts.jsonl --out {folder}/draft"
    assert cli.main([*line.split(), "--rollouts", "2", "--batch-size", "3", "--max-new-tokens", "12"]) == 0
    assert "acceptance by position" in capsys.readouterr().out
    config = SpecConfig(draft_model_path=str(folder / "draft"), num_speculative_tokens=2)
    backend = EmbeddedBackend(build_policy(build_tokenizer()), config)
    assert backend.drafter.ready and backend.draft_version >= 1
    backend.generate([[3, 4, 5]], SamplingParams(max_new_tokens=9))
    assert backend.stats.drafted > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rollouts 0", "--rollouts: 0 is out of range"),
        ("--temperature -1", "temperature=-1.0 is out of range"),
        ("--prompts {}/empty.jsonl", "empty.jsonl is empty"),
        ("--prompts {}/torn.jsonl", "torn.jsonl cannot be read as jsonl"),
    ],
)
def test_nothing_to_do_is_refused(folder, capsys, options, message):
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_text('{"prompt": "a b"}\n{"pro')
    line = f"pretrain-draft --policy {folder}/policy --prompts {folder}/prompts.jsonl --out {folder}/draft {options}"
    with pytest.raises(SystemExit) as stop:
        cli.main(line.format(folder).split())
    assert message in f"{stop.value}{capsys.readouterr().err}"


def test_prompts_that_are_not_there(folder):
    line = f"pretrain-draft --policy {folder}/policy --prompts {folder}/none.jsonl --out {folder}/draft"
    with pytest.raises(SystemExit, match=r"none\.jsonl does not exist"):
        cli.main(line.split())


def test_a_policy_that_is_not_there(folder):
    line = f"pretrain-draft --policy {folder}/none --prompts {folder}/prompts.jsonl --out {folder}/draft"
    with pytest.raises(SystemExit, match="cannot be loaded"):
        cli.main(line.split())
