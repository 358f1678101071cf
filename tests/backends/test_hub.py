"""Names of models and datasets that are not there."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from spec_rollout.backends import hub


@pytest.fixture
def answer(monkeypatch):
    """Has the Hub raise an error; returns what it was asked for."""
    asked = []

    def given(error: Exception | None) -> list[str]:
        def metadata(url):
            asked.append(url)
            if error:
                raise error

        monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        return asked

    return given


def refusal(kind: type[Exception]) -> Exception:
    response = httpx.Response(404, request=httpx.Request("HEAD", "https://hub"))
    return kind("no", response=response)


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.ConnectError("no route"), r"no/such is no local path, and https://\S+ cannot be reached \(no route\)"),
        (httpx.ConnectTimeout("slow"), "cannot be reached"),
        (refusal(RepositoryNotFoundError), "no/such is neither a local path nor a {kind} on the Hub.*hf auth login"),
    ],
)
def test_a_missing_name_is_asked_for_once(error, message, kind, answer):
    asked = answer(error)
    with pytest.raises(ValueError, match=message.format(kind=kind)):
        hub.require("no/such", kind)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "error", [None, refusal(GatedRepoError), refusal(RemoteEntryNotFoundError), httpx.ReadTimeout("busy")]
)
def test_the_loader_is_left_to_say_the_rest(error, answer):
    asked = answer(error)
    hub.require("some/model", revision="v2")
    assert len(asked) == 1 and asked[0].endswith("some/model/resolve/v2/config.json")


def test_nothing_is_asked_without_need(answer, tmp_path, monkeypatch):
    asked = answer(httpx.ConnectError("no route"))
    hub.require(str(tmp_path))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *given, **options: "file")
    hub.require("cached/model")
    monkeypatch.undo()
    answer(httpx.ConnectError("no route"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.require("no/such")
    assert not asked


def test_a_path_is_no_name_on_the_hub(answer, tmp_path):
    asked = answer(None)
    with pytest.raises(ValueError, match=r"none does not exist: give a local path, or a name on the Hub\."):
        hub.require(str(tmp_path / "none"))
    assert not asked
