"""A timm network's hub weights: from the cache, else from the hub, else at once an error that helps."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

FILES = ("model.safetensors", "pytorch_model.bin")
PATIENCE_S = 3.0  # the libraries' own retries take 47 seconds to say the same


def has_weights(name: str) -> bool:
    """Whether timm knows hub weights for this network (`name` or `name.tag`)."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config is not None and (config.hf_hub_id or config.url))


def find_weights(name: str) -> Path:
    """The file of a network's hub weights, fetched if need be.

    Raises ValueError when timm has none for this network, FileNotFoundError when they are neither in the cache nor
    within reach.
    """
    import timm

    if not has_weights(name):
        raise ValueError(
            f"there are no hub weights for {name}. Type pretrained=false, or give weights: checkpoint=PATH"
        )
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return from_hub(name, config) if config.hf_hub_id else from_url(name, config.url)


def from_hub(name: str, config) -> Path:
    """Weights of the Hugging Face hub."""
    import huggingface_hub

    repo = config.hf_hub_id if "/" in str(config.hf_hub_id) else f"timm/{name}"
    files = (config.hf_hub_filename,) if getattr(config, "hf_hub_filename", None) else FILES
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if offline() or not reachable(endpoint):
        raise FileNotFoundError(unreachable(name, endpoint, f"the Hugging Face cache ({repo})"))
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        except huggingface_hub.errors.EntryNotFoundError:
            continue
        except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise FileNotFoundError(unreachable(name, endpoint, f"the Hugging Face cache ({repo})")) from error
    raise FileNotFoundError(unreachable(name, endpoint, f"the Hugging Face cache ({repo})"))


def from_url(name: str, url: str) -> Path:
    """Weights that lie at a plain address."""
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rsplit("/", 1)[-1]
    if file.is_file():
        return file
    host = "/".join(url.split("/")[:3])
    if offline() or not reachable(host):
        raise FileNotFoundError(unreachable(name, host, f"torch's cache ({file.name})"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(url, str(file), progress=False)
    return file


def offline() -> bool:
    """Whether the environment says that there is no hub."""
    return any(
        os.environ.get(k, "").upper() in ("1", "ON", "YES", "TRUE") for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def reachable(address: str) -> bool:
    """Whether a server answers at all, through the proxies of the environment; never longer than three seconds."""
    answer: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE_S):
                answer.append(True)
        except urllib.error.HTTPError as error:
            answer.append(error.code not in (502, 503, 504))
        except (OSError, ValueError):
            answer.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return bool(answer and answer[0])


def unreachable(name: str, address: str, cache: str) -> str:
    """What to say, with the three ways out."""
    return (
        f"hub weights of {name} are not in the cache and {address} cannot be reached. "
        f"Either give weights that you have: teacher.checkpoint=PATH (student.checkpoint=PATH); "
        f"or start from random weights on purpose: teacher.pretrained=false (student.pretrained=false); "
        f"or put the weights into {cache}, by running the same once where there is a network"
    )
