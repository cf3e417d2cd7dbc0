"""``st-clp doctor``: the facts that a bug report needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from st_clp.cli.settings_command import with_error_messages
from st_clp.files import versions
from st_clp.terminal import new_console

HUB_SECONDS = 5.0
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/\s]*@|\?\S*")  # a user and password, or what may be a key in a query


@with_error_messages
def doctor() -> None:
    """Print versions, devices and their kernels, whether the Hub can be reached, and where files are kept.

    Secrets are not printed: of keys only whether they are set.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    console = new_console(soft_wrap=True, markup=False)
    for title, lines in (
        ("Versions", _versions()),
        ("Devices", _devices()),
        ("Hugging Face Hub", _hub()),
        ("Kept in", _places()),
        ("Environment", _environment()),
    ):
        console.print(title)
        for name, value in lines:
            console.print(f"  {name:<22} {value}")


def _versions() -> Iterator[tuple[str, str]]:
    import platform

    further = ("accelerate", "peft", "bm25s", "openai", "matplotlib", "ray", "mteb")
    found = versions(*further)
    yield from found.items()
    yield "system", platform.platform()
    yield from ((package, "not installed") for package in further if package not in found)


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from st_clp.encoding import kernels

    yield "processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; encoding: {kernels('cpu')}"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        device = f"cuda:{number}"
        yield device, f"{found.name}, {found.total_memory / 2**30:.0f} GiB; encoding: {kernels(device)}"
    if torch.backends.mps.is_available():
        yield "mps", f"encoding: {kernels('mps')}"


def _hub() -> Iterator[tuple[str, str]]:
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    from huggingface_hub import constants, get_token

    yield "address", _without_secrets(constants.ENDPOINT)
    yield "token", "set" if get_token() else "none"
    if constants.HF_HUB_OFFLINE:
        yield "access", "not tried: HF_HUB_OFFLINE is set"
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            yield "access", "reached"
    except urllib.error.HTTPError as error:
        yield "access", f"answers with status {error.code}"
    except (OSError, ValueError, HTTPException) as error:  # no connection, no address, or an answer that is no page
        reason = _without_secrets(str(getattr(error, "reason", error))) or type(error).__name__
        yield "access", f"not reached ({reason}): models must be folders here"


def _places() -> Iterator[tuple[str, str]]:
    from huggingface_hub import constants

    home = os.environ.get("IR_DATASETS_HOME")
    yield "models of the Hub", constants.HF_HUB_CACHE
    yield "ir_datasets", home or str(Path.home() / ".ir_datasets")
    yield "embeddings", "OUTPUT/embeddings of st-clp mine and evaluate, run/embeddings of st-clp run; or --store"
    yield "generated queries", "OUTPUT/queries.sqlite, run/queries.sqlite of st-clp run; or --query-store"


def _environment() -> Iterator[tuple[str, str]]:
    for name in sorted({*os.environ, "OPENAI_API_KEY"}):
        if name.startswith(("ST_CLP_", "HF_", "OMP_", "CUDA_", "TOKENIZERS_", "IR_DATASETS_", "OPENAI_")):
            value = os.environ.get(name)
            hidden = SECRET.search(name) and name != "TOKENIZERS_PARALLELISM"
            yield name, "not set" if value is None else "set" if hidden else _without_secrets(value)


def _without_secrets(text: str) -> str:
    return IN_ADDRESS.sub("…", text) if "://" in text else text
