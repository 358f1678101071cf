"""Whether a model or a dataset is there at all, asked once: the libraries that load them ask for up to a minute."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx  # what this version raises from: findings/hub2-raises-httpx2.sh

PROBED = {"model": "config.json", "dataset": "README.md"}


def require(name: str, kind: str = "model", revision: str | None = None) -> None:
    """Refuse a name that is neither a local path nor on the Hub.

    Whatever else keeps it from being loaded is left to be told by who loads it: a gated model, a server that is busy.
    Offline, or with a copy in the Hub's cache, nothing is asked.

    Args:
        name: local path or name on the Hub.
        kind: "model" or "dataset".

    Raises:
        ValueError: there is no such path, and the Hub has no such name or cannot be reached.
    """
    file = PROBED[kind]
    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        if try_to_load_from_cache(name, file, revision=revision, repo_type=kind) is None:
            get_hf_file_metadata(hf_hub_url(name, file, revision=revision, repo_type=kind))
    except HFValidationError as error:
        raise ValueError(f"{name} does not exist: give a local path, or a name on the Hub.") from error
    except GatedRepoError:
        return
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither a local path nor a {kind} on the Hub: correct the name, or log in with "
            "`hf auth login` if it is private."
        ) from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ValueError(
            f"{name} is no local path, and {constants.ENDPOINT} cannot be reached ({error}): give a local path, or "
            "connect to the Hub."
        ) from error
    except (HfHubHTTPError, httpx.TransportError):
        return
