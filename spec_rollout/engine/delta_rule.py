"""The delta rule over the few tokens of a pass over guesses, all of them at once.

With S the state before the pass, c the running sum of the log decays, k, v and b a token's key, value and step, what
token t adds to the state is k_t u_t with

    u_t = b_t (v_t - (k_t exp c_t) S - sum over i < t of (k_t · k_i exp(c_t - c_i)) u_i)

The u need nothing that comes later, so the state after any number of the tokens is one product of them: no token is
read twice. Token by token, the state, the largest of all these tensors, would be read and written for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Under the root of a key's and a query's norm, as transformers has it."""


class GuessedTokens:
    """The tokens of one pass: `query`, `key` [N, T, H, K], or of fewer heads that several of the others share, `value`
    [N, T, H, V], the log decay `g` [N, T, H] or, by channel of the key (Kimi), [N, T, H, K], and the step `beta`
    [N, T, H]. All is computed in float32.

    It is an `Advance` (`engine/recurrent.py`): called once for the outputs, and once more for the state after the
    tokens that came true.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normalised: bool):
        self.dtype = query.dtype
        if g.dim() == 3:
            g = g[..., None]
        query, key, self.value, g, beta = (
            x.transpose(1, 2).float() for x in (query, key, value, g, beta)
        )  # [N, H, T]
        groups = self.value.shape[1] // key.shape[1]
        if groups > 1:
            query, key = (x.repeat_interleave(groups, 1) for x in (query, key))
        if normalised:
            query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON) for x in (query, key))
        self.query, self.key, self.step = query * query.shape[-1] ** -0.5, key, beta[..., None]
        self.decay = g.cumsum(2)  # [N, H, T, K or 1]
        self.news: Tensor | None = None

    def __call__(self, state: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [N, T, H, V], with `valid` None; then, with the tokens that are `valid` [N, T], the state [N, H, K,
        V] after them. What is not asked for is given back as it is."""
        if state is None:
            state = self.key.new_zeros(*self.key.shape[:2], self.key.shape[-1], self.value.shape[-1])
        with torch.autocast(state.device.type, enabled=False):
            if valid is None:
                return self._outputs(state.float()).transpose(1, 2).to(self.dtype), state
            return self.value, self._after(state.float(), valid)

    def _outputs(self, state: Tensor) -> Tensor:
        between = self.decay[:, :, :, None] - self.decay[:, :, None]  # [N, H, T, T, K or 1]
        size = between.shape[2]
        later = torch.ones(size, size, dtype=torch.bool, device=state.device).triu(1)
        weights = self.key[:, :, None] * between.masked_fill(later[..., None], -torch.inf).exp()
        by_query, by_key = ((weights * x[:, :, :, None]).sum(-1) for x in (self.query, self.key))  # [N, H, T, T]
        fading = self.decay.exp()
        known = torch.cat([self.key * fading, self.query * fading], 2) @ state
        news = self.step * (self.value - known[:, :, :size])
        self.news = torch.linalg.solve_triangular(self.step * by_key, news, upper=False, unitriangular=True)
        return known[:, :, size:] + by_query @ self.news

    def _after(self, state: Tensor, valid: Tensor) -> Tensor:
        hidden = ~valid[:, None, :, None]
        last = F.pad(self.decay, (0, 0, 1, 0))  # 0 before the first
        count = valid.sum(1)[:, None, None, None].expand(-1, last.shape[1], 1, last.shape[3])
        end = last.gather(2, count)  # [N, H, 1, K or 1]
        keys = (self.key * (end - self.decay).exp()).masked_fill(hidden, 0)  # both: nothing times NaN is NaN
        return state * end.exp().transpose(2, 3) + keys.transpose(2, 3) @ self.news.masked_fill(hidden, 0)
