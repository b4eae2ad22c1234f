"""Single small files of a hub model, from the cache or the hub, with a bounded wait."""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

TIMEOUT_S = 5.0


class HubUnreachable(Exception):
    """The file cannot be had; the message says why in a few words."""


def hub_file(hub_id: str, name: str) -> Path | None:
    """A file of the model, from the cache (`HF_HOME`) or the hub; None where the model has no such file.

    Raises:
        HubUnreachable: no answer within seconds, no such model, no access, or offline and not in the cache.
    """
    try:
        cached = try_to_load_from_cache(hub_id, name)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None
        # Asked first, because the download itself tries again for half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(hub_id, name), timeout=TIMEOUT_S)
        return Path(hf_hub_download(hub_id, name, etag_timeout=TIMEOUT_S))
    except OfflineModeIsEnabled:
        raise HubUnreachable("offline mode is on, and it is not in the cache") from None
    except GatedRepoError:
        raise HubUnreachable("the hub grants access to it only on request") from None
    except RepositoryNotFoundError:
        raise HubUnreachable("the hub knows no such model, or it is private") from None
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise HubUnreachable(f"the hub answered {error.response.status_code}") from None
    except Exception as error:  # whichever HTTP library the hub's client is built on has its own errors
        raise HubUnreachable(f"the hub cannot be reached: {type(error).__name__}") from None
