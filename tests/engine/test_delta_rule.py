"""The delta rule over a pass's guesses at once: what transformers' kernels compute token by token."""

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from spec_rollout.engine.delta_rule import GuessedTokens
from spec_rollout.engine.recurrent import first

pytestmark = pytest.mark.any_device

ROWS, HEADS, WIDTH, VALUES = 3, 2, 8, 12
KERNELS = {"gated": torch_recurrent_gated_delta_rule, "Kimi": recurrent_kimi_delta_attention}


def tokens(kind: str, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)

    def normal(*shape):
        return torch.randn(ROWS, count, HEADS, *shape, generator=generator)

    channels = [WIDTH] if kind == "Kimi" else []
    return [normal(WIDTH), normal(WIDTH), normal(VALUES), -normal(*channels).abs(), normal().sigmoid()]


def token_by_token(kind, state, query, key, value, g, beta, normalised=True):
    given = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": normalised}
    return KERNELS[kind](query, key, value, g=g, beta=beta, **given)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "from zeros"])
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("kind", KERNELS)
def test_outputs_and_the_state_after_any_number_of_tokens(kind, count, begun):
    state = torch.randn(ROWS, HEADS, WIDTH, VALUES, generator=torch.Generator().manual_seed(0)) if begun else None
    given = tokens(kind, count)
    for normalised in (True, False):
        rule = GuessedTokens(*given, normalised)
        expected, _ = token_by_token(kind, state, *given, normalised)
        output, before = rule(state, None)
        torch.testing.assert_close(output, expected)
        assert before.shape == (ROWS, HEADS, WIDTH, VALUES)
        for kept in range(count + 1):
            lengths = torch.tensor([kept, max(kept - 1, 0), min(2, count)])
            _, after = rule(state, first(lengths, count))
            for row, length in enumerate(lengths.tolist()):
                one = [x[row : row + 1, :length] for x in given]
                own = before[row : row + 1]
                right = token_by_token(kind, own, *one, normalised)[1] if length else own
                torch.testing.assert_close(after[row : row + 1], right)


def test_nan_in_a_rejected_guess_stays_out_of_the_state():
    state = torch.zeros(ROWS, HEADS, WIDTH, VALUES)
    given = tokens("gated", 4)
    clean, soiled = GuessedTokens(*given, True), [x.clone() for x in given]
    for x in soiled[:3]:
        x[1, 2:] = torch.nan
    rule = GuessedTokens(*soiled, True)
    valid = first(torch.tensor([4, 2, 1]), 4)
    clean(state, None), rule(state, None)
    torch.testing.assert_close(rule(state, valid)[1], clean(state, valid)[1])


def test_the_decay_of_many_tokens_does_not_overflow():
    """exp of a sum of log decays is taken of differences only, none above 0."""
    query, key, value, g, beta = tokens("Kimi", 8)
    rule = GuessedTokens(query, key, value, g - 30, beta, True)
    output, state = rule(torch.ones(ROWS, HEADS, WIDTH, VALUES), None)
    assert output.isfinite().all() and rule(state, first(torch.full((ROWS,), 5), 8))[1].isfinite().all()


def test_the_outputs_keep_the_dtype_and_the_state_stays_float32():
    given = [x.bfloat16() for x in tokens("gated", 3)]
    rule = GuessedTokens(*given, True)
    output, state = rule(None, None)
    after = rule(state, first(torch.full((ROWS,), 2), 3))[1]
    assert output.dtype == torch.bfloat16 and state.dtype == after.dtype == torch.float32
    expected, _ = token_by_token("gated", None, *given)
    torch.testing.assert_close(output, expected)


def test_autocast_takes_no_digits_of_the_state():
    given, state = (
        tokens("gated", 4),
        torch.randn(ROWS, HEADS, WIDTH, VALUES, generator=torch.Generator().manual_seed(0)),
    )
    valid = first(torch.tensor([4, 2, 1]), 4)
    whole, cast = GuessedTokens(*given, True), GuessedTokens(*given, True)
    expected = whole(state, None)[0], whole(state, valid)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = cast(state, None)[0], cast(state, valid)[1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_heads_of_keys_may_be_shared():
    """As transformers hands them over from 5.24 on."""
    query, key, *others = tokens("gated", 4)
    state, few = torch.zeros(ROWS, HEADS, WIDTH, VALUES), [x[:, :, :1] for x in (query, key)]
    many = [x.expand(-1, -1, HEADS, -1) for x in few]
    torch.testing.assert_close(
        GuessedTokens(*few, *others, True)(state, None)[0], token_by_token("gated", state, *many, *others)[0]
    )
