"""Locates a checkpoint: a folder, a hub repository, or the one bundled with the package."""

import re
from pathlib import Path

from trt_kv.errors import CheckpointError, UsageError
from trt_kv.presets import preset
from trt_kv.require import require

HUB_FILES = (
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files downloaded from a repository: no pickles, and not the second copy of the weights that some repositories contain."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_checkpoint(model: str | None, checkpoint: str | None) -> Path:
    """The checkpoint's folder: ``checkpoint`` (a folder, or a hub id ``owner/name``), else the one bundled for
    preset ``model``. An empty string counts as not given.

    A hub id is looked up, and downloaded if needed, by huggingface_hub with its cache, token, endpoint and offline mode.
    Raises ``UnknownNameError`` for an unknown model, ``UsageError`` if neither is given, and ``CheckpointError`` if there is
    no such folder or the repository cannot be downloaded.
    """
    bundled = preset(model).bundled_folder if model else None
    if checkpoint:
        return _folder_or_snapshot(checkpoint)
    if bundled is None:
        raise UsageError("no model is named", expected="MODEL or CHECKPOINT", fix="e.g. MODEL=llama3")
    return bundled


def _folder_or_snapshot(checkpoint: str) -> Path:
    folder = Path(checkpoint).expanduser() if checkpoint.startswith("~/") else Path(checkpoint)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{checkpoint} is a file", expected="the folder that holds config.json and the weights")
    # `models/mine` is a path and not a hub id if a folder `models` exists; so are `./mine` and `../mine`.
    if not _HUB_ID.fullmatch(checkpoint) or folder.parent.is_dir():
        raise CheckpointError(
            f"no such folder: {checkpoint!r}",
            got="a path that does not exist",
            expected="a checkpoint's folder, or a hub id such as meta-llama/Llama-3.1-8B-Instruct",
            fix="check the spelling; owner/name is read as a path if there is a folder called owner",
        )
    return _snapshot(checkpoint)


def _snapshot(hub_id: str) -> Path:
    hub, errors = require("huggingface_hub"), require("huggingface_hub.errors")
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except errors.GatedRepoError as error:
        fix = f"accept its licence at https://huggingface.co/{hub_id}, then run 'hf auth login'; or pass a folder"
        raise _not_available(hub_id, "the repository is gated, and this account has no access", fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the spelling; for a private repository run 'hf auth login'; or pass a folder"
        raise _not_available(hub_id, "no such repository, or it is private", fix) from error
    except (errors.HTTPError, errors.XetDownloadError, errors.HFValidationError, OSError) as error:
        fix = (
            "pass a folder that holds the checkpoint, or run where the hub can be reached; "
            "HF_HUB_OFFLINE=1 works for a repository that is already in the cache"
        )
        raise _not_available(hub_id, _first_lines(error), fix) from error


def _not_available(hub_id: str, got: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"cannot get {hub_id!r} from the Hugging Face hub", got=got, expected="a repository or a cached copy", fix=fix
    )


def _first_lines(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(lines[:2])
