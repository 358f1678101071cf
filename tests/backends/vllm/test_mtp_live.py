"""A policy and its own MTP head in a running vLLM: pushed, read back, guessed with, learned on and saved."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.worker import LiveWeights
from spec_rollout.config import SpecConfig
from spec_rollout.records import SamplingParams
from tests.backends.vllm.test_mtp import FAMILIES, gap, learned_by_heart, text_only  # noqa: F401
from tests.backends.vllm.tiny import PROMPTS, ROWS, needs_vllm, runner, starter
