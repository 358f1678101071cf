"""What `test_mtp_live` shows, of policies with recurrent layers and experts."""

import pytest

from tests.backends.vllm.live_mtp import check
from tests.backends.vllm.test_mtp import text_only  # noqa: F401
from tests.backends.vllm.tiny import needs_vllm

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman", "generous", "text_only")]


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe_text"])
def test_a_push_is_as_good_as_a_start(name, tmp_path):
    check(name, tmp_path)
