"""The value function of PPO: a head on the policy's trunk, or a critic of its own; part of the policy while it trains.

As a submodule of the policy it shares its optimiser, its gradient all-reduce and its forward pass. It is kept out of
the policy's own files: those are what they would be without it.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

ATTRIBUTE = "value_function"
HEAD_FILE = "value_head.safetensors"
CRITIC_FOLDER = "value_model"
TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
"""Of a batch, what the forward pass reads."""


class ValueHead(nn.Module):
    """Values from the policy's last hidden states; float32, and 0 everywhere at first."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [B, L] after each token, from `hidden` [B, L, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).squeeze(-1)

    def save(self, folder: str | Path, weights: dict[str, Tensor]) -> None:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, Path(folder, HEAD_FILE))

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote.

        Raises:
            ValueError: there are none.
        """
        file = Path(folder, HEAD_FILE)
        if not file.is_file():
            raise ValueError(f"{folder} holds no {HEAD_FILE}: it is not a checkpoint of PPO with a value head.")
        self.load_state_dict(load_file(file))


class Critic(nn.Module):
    """Values from a sequence classification model with one label, such as a reward model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [B, L] float32 after each token of `input_ids` [B, L]."""
        trunk = getattr(self.model, self.model.base_model_prefix)
        own = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.model.score(own).squeeze(-1).float()

    def save(self, folder: str | Path, weights: dict[str, Tensor]) -> None:
        """Write the model as `save_pretrained` does, so that it can be given as `value_model` again."""
        own = {name.removeprefix("model."): weight for name, weight in weights.items()}
        self.model.save_pretrained(Path(folder, CRITIC_FOLDER), state_dict=own)

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote.

        Raises:
            ValueError: there are none.
        """
        saved = Path(folder, CRITIC_FOLDER)
        if not saved.is_dir():
            raise ValueError(f"{folder} holds no {CRITIC_FOLDER}: it is not a checkpoint of PPO with a critic.")
        weights = type(self.model).from_pretrained(saved, dtype=self.model.dtype).state_dict()
        self.model.load_state_dict(weights)


@dataclass
class ValuedOutput(FusedCausalLMOutput):
    """What TRL's fused output head returns, and `state_values` [B, L − 1] float32: of the prefix before each label.

    Not named `values`: it is a dictionary, whose method that is.
    """

    state_values: Tensor | None = None


def causal_model(policy: nn.Module) -> PreTrainedModel:
    """The causal language model itself, without adapters around it."""
    return policy.get_base_model() if is_peft_model(policy) else policy


def make_value_function(
    policy: nn.Module, value_model: str | PreTrainedModel | None, trust_remote_code: bool = False
) -> ValueHead | Critic:
    """A head for the policy where `value_model` is None, else a critic from that model or folder.

    A critic that comes without a trained `score` head starts at 0 everywhere.

    Raises:
        ValueError: the model cannot serve as a critic of this policy.
    """
    causal = causal_model(policy)
    if value_model is None:
        return ValueHead(causal.config.get_text_config(decoder=True).hidden_size)
    if isinstance(value_model, str):
        value_model, found = AutoModelForSequenceClassification.from_pretrained(
            value_model,
            num_labels=1,
            dtype=causal.dtype,
            attn_implementation=causal.config._attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        if "score.weight" in found["missing_keys"]:
            nn.init.zeros_(value_model.score.weight)
    _refuse_unfit(value_model, causal)
    return Critic(value_model.requires_grad_(True))


def _refuse_unfit(value_model: PreTrainedModel, policy: PreTrainedModel) -> None:
    score = getattr(value_model, "score", None)
    if score is None or score.out_features != 1:
        found = "no `score` head" if score is None else f"a `score` head of {score.out_features} labels"
        raise ValueError(
            f"value_model is a {type(value_model).__name__} with {found}: give a sequence classification model with "
            "num_labels=1, the folder of one or of a causal language model, or None for a head on the policy."
        )
    own, needed = (model.config.get_text_config(decoder=True).vocab_size for model in (value_model, policy))
    if own < needed:
        raise ValueError(
            f"value_model has a vocabulary of {own} tokens, the policy one of {needed}: a critic reads the policy's "
            "tokens, so it must share its tokenizer."
        )


def attach_value_function(policy: nn.Module, function: ValueHead | Critic) -> None:
    """Make `function` a part of `policy`, on which TRL's fused output head (`add_fused_lm_head`) already is.

    From then on `policy(..., fused_lm_head=True, with_values=True)` returns a `ValuedOutput`.
    """
    causal = causal_model(policy)
    causal.add_module(ATTRIBUTE, function.to(causal.device))
    # transformers leaves these out when it saves the policy, and does not miss them when it loads it
    causal._keys_to_ignore_on_save = {f"{ATTRIBUTE}.{name}" for name in function.state_dict()}
    scored = causal.forward

    @functools.wraps(type(causal).forward)  # `generate` reads the signature
    def forward(self, *args, with_values: bool = False, **kwargs):
        if not with_values:
            return scored(*args, **kwargs)
        trunk: list[Tensor] = []
        hook = self.base_model.register_forward_hook(lambda module, a, output: trunk.append(output.last_hidden_state))
        try:
            outputs = scored(*args, **kwargs)
        finally:
            hook.remove()
        values = getattr(self, ATTRIBUTE)(trunk[-1], kwargs["input_ids"], kwargs["attention_mask"])
        return ValuedOutput(**outputs, state_values=values[:, :-1])

    causal.forward = types.MethodType(forward, causal)


def read_completions(
    policy: nn.Module, batch: dict[str, Tensor], **options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-probs, entropies and values [B, T] of the completions in `batch`, and the auxiliary loss of a mixture of
    experts if `options` ask for it. Each value is that of the state in which its token was chosen."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = (batch[name] for name in TOKENS)
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, : prompt_ids.shape[1]] = -100
    outputs = policy(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        fused_lm_head=True,
        with_values=True,
        **options,
    )
    tokens = (outputs.log_probs, outputs.entropy, outputs.state_values)
    return *(x[:, -completion_ids.shape[1] :] for x in tokens), outputs.aux_loss


def set_learning_rate(optimizer: torch.optim.Optimizer, function: nn.Module, rate: float) -> None:
    """Give the parameters of `function` groups of their own in `optimizer`, which has taken no step yet."""
    own = {id(weight) for weight in function.parameters()}
    for group in list(optimizer.param_groups):
        moved = [weight for weight in group["params"] if id(weight) in own]
        group["params"] = [weight for weight in group["params"] if id(weight) not in own]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


def value_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value function's part of a policy's state dict, named as the value function names it."""
    split = {name: name.partition(f"{ATTRIBUTE}.") for name in state_dict}
    return {own: state_dict[name] for name, (_, found, own) in split.items() if found}
