"""GSM8K from a local file or folder to a trained policy."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from spec_rollout.training.launch import launch
from tests.tasks.test_gsm8k import ROWS


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_local_copy_trains(make_policy, tokenizer, tmp_path, peeking, kind):
    make_policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    source = tmp_path / "train.jsonl" if kind == "file" else tmp_path / "gsm8k"
    if kind == "folder":
        source.mkdir()
        Dataset.from_list(ROWS).to_parquet(source / "train-00000-of-00001.parquet")
    else:
        Dataset.from_list(ROWS).to_json(source)
    line = f"--dataset_name {source} --dataset_format gsm8k --model_name_or_path {tmp_path / 'policy'} --use_cpu"
    line += f" --bf16 false --output_dir {tmp_path / 'out'} --per_device_train_batch_size 4 --num_generations 2"
    line += " --max_completion_length 6 --max_steps 1 --report_to none --save_strategy no --disable_tqdm true"
    trainer = launch(SpecGRPOTrainer, SpecGRPOConfig, [*line.split(), "--max_slots", "3", "--logging_steps", "1"])
    assert trainer.train_dataset.column_names == ["answer", "prompt"]
    assert "rewards/accuracy_reward/mean" in trainer.state.log_history[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
