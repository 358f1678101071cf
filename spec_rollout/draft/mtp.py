"""The checkpoint's own multi-token prediction head as a draft: one more decoder layer of the policy's own kind.

transformers leaves its tensors out when it loads a policy. The names on disk are those that vLLM and SGLang read.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from spec_rollout.draft.checkpoint import replace_folder
from spec_rollout.draft.checkpoint_reader import read_config
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import HeadConfig
from spec_rollout.draft.policy_view import decoder_layers
from spec_rollout.engine.attention import GROUPED_SDPA
from spec_rollout.engine.kv_cache import SlotWindow, causal_mask
from spec_rollout.engine.target import cache_argument

ARCHITECTURE = "SpecRolloutMTP"
PREFIX, FILE = "mtp.", "mtp.safetensors"
OWN_NAMES = {"norm.": "final_norm."}
"""Names on disk, without the prefix, where this module has others."""


class MtpHead(nn.Module):
    """Predicts the token after next from (token i + 1, the policy's final hidden state at i).

    `fc` joins the two, each normed, and a decoder layer of the policy's own class with full attention reads them. The
    normed output goes through the policy's output head, and is what a further guess reads in place of a hidden state.
    Its interface is that of `EagleHead` but for the attention, which runs inside `read`, on a cache.

    Raises:
        ValueError: the policy has no decoder layer with full attention.
    """

    own_output = None

    def __init__(self, model: nn.Module):
        super().__init__()
        config = copy.deepcopy(model.config.get_text_config(decoder=True))
        config._attn_implementation = GROUPED_SDPA
        layers, kinds = decoder_layers(model), getattr(config, "layer_types", None) or []
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        if not layers or not full:
            raise ValueError(f"{type(model).__name__} has no decoder layer with full attention for an MTP head.")
        donor, width = layers[full[-1]], config.hidden_size
        norm = type(donor.input_layernorm)
        with torch.random.fork_rng(devices=[]):
            self.fc = nn.Linear(2 * width, width, bias=False)
            self.layers = nn.ModuleList([type(donor)(config, full[-1])])
            self.pre_fc_norm_embedding = norm(width, eps=config.rms_norm_eps)
            self.pre_fc_norm_hidden = norm(width, eps=config.rms_norm_eps)
            self.final_norm = norm(width, eps=config.rms_norm_eps)
        self.norm = nn.Identity()
        self.register_buffer("feature_scale", torch.ones(width), persistent=False)
        self.config = HeadConfig(
            hidden_size=width,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            aux_layers=(config.num_hidden_layers,),
        )
        self._borrowed = (model.get_decoder().rotary_emb,)  # the policy's, and no part of this module
        self._cache_argument = cache_argument(self.layers[0])

    @property
    def fused_width(self) -> int:
        return self.config.hidden_size

    @property
    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(weight.isfinite().all()) for weight in self.parameters())

    def fuse(self, features: Tensor) -> Tensor:
        """The policy's final hidden states [..., H], as they are."""
        return features

    def folded(self) -> dict[str, Tensor]:
        return self.state_dict()

    def read(self, embeds: Tensor, hidden: Tensor, place: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """The normed output [N, T, H] at `place` [N, T] from `embeds` and `hidden` [N, T, H]; `mask` [N, 1, T, E] says
        what of the E entries of `cache`, after this pass, each sees."""
        pair = [self.pre_fc_norm_embedding(embeds.to(hidden.dtype)), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(torch.cat(pair, -1))
        (rotary,) = self._borrowed
        axes = getattr(rotary, "mrope_section", None)  # of images; text has one position for all
        turns = rotary(x, place if axes is None else place[None].expand(3, -1, -1))
        given = {"attention_mask": mask, "position_embeddings": turns, "position_ids": place}
        output = self.layers[0](x, **given, **{self._cache_argument: cache})
        return self.final_norm(output[0] if isinstance(output, tuple) else output)

    def on_disk(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors under the names that checkpoints give them."""
        names = {own: theirs for theirs, own in OWN_NAMES.items()}
        return {
            PREFIX + _renamed(name, names): tensor.detach().to(dtype).cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }

    def take(self, tensors: dict[str, Tensor], source: str | Path) -> None:
        """Load `tensors`, named as on disk.

        Raises:
            ValueError: they are not those of a head like this one; `source` is named.
        """
        given = {_renamed(name.removeprefix(PREFIX), OWN_NAMES): tensor.float() for name, tensor in tensors.items()}
        own = {name: tensor.shape for name, tensor in self.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in given.items()}
        wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
        if wrong:
            raise ValueError(
                f"The MTP tensors in {source} are not one dense decoder layer of this policy: {', '.join(wrong[:4])} "
                f"({len(wrong)} in all) are missing, foreign or of another shape. Guess with draft_head='eagle3'."
            )
        self.load_state_dict(given)


class MtpDrafter(EagleDrafter):
    """Guesses with an `MtpHead`: as with an EAGLE head, but that the layer reads the cache by itself."""

    def _layer(
        self,
        tokens: Tensor,
        hidden: Tensor,
        place: Tensor,
        extent: int,
        keys: list[Tensor],
        values: list[Tensor],
        start: int = 0,
    ) -> Tensor:
        window = SlotWindow(keys, values, keys[0].shape[::2], start, place, extent)
        mask = causal_mask(place, extent)
        return self.head.read(self.view.embed(tokens), hidden, place, mask, window)


class Unrolled(Cache):
    """Keys and values of several unrolled steps, one behind the other."""

    def __init__(self):
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.keys.append(key_states)
        self.values.append(value_states)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


def unrolled_mask(visible: Tensor, steps: int) -> Tensor:
    """Boolean [R, 1, N, P + steps · N]: entries `visible` [R, N, P] of the first step, and of each further one the key
    at the same start."""
    own = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device).expand(len(visible), -1, -1)
    return torch.cat([visible, *[own] * steps], -1)[:, None]


def save_mtp(folder: str | Path, head: MtpHead, extra: dict, optimizer: dict[str, Tensor] | None = None) -> None:
    """Write `head` with json-able `extra` to `folder`, as `save_head` does an EAGLE head."""
    config = {"architectures": [ARCHITECTURE], "hidden_size": head.config.hidden_size, "spec_rollout": extra}
    replace_folder(folder, head.on_disk(torch.float32), config, optimizer)


def is_mtp(folder: str | Path) -> bool:
    """Whether `save_mtp` wrote the draft in `folder`."""
    return read_config(folder).get("architectures") == [ARCHITECTURE]


def load_mtp(folder: str | Path, model: nn.Module) -> tuple[MtpHead, dict]:
    """The head that `save_mtp` wrote for the policy `model`, and its `extra`.

    Raises:
        ValueError: it is unreadable, or made for another policy.
    """
    head = MtpHead(model)
    head.take(find_tensors(str(folder)), folder)
    return head, read_config(folder)["spec_rollout"]


def find_tensors(policy: str | None) -> dict[str, Tensor]:
    """The MTP tensors, named as on disk, of the policy's folder or of its copy in the Hub's cache; empty if none."""
    folder = Path(policy or "")
    if policy and not folder.is_dir():
        config = cached_file(policy, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        folder = Path(config).parent if config else folder
    if not policy or not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118
    return found


def add_to_policy(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` beside the weights of the policy saved in `folder`, and into their index if there is one."""
    folder = Path(folder)
    save_file(tensors, folder / FILE)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(tensors, FILE)
        index.write_text(json.dumps(listed, indent=2) + "\n")


def _renamed(name: str, names: dict[str, str]) -> str:
    start = next((start for start in names if name.startswith(start)), None)
    return name if start is None else names[start] + name.removeprefix(start)
