"""Locates a checkpoint: a folder, a GGUF file, a hub repository, or that of a preset."""

import glob
import re
from dataclasses import dataclass
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

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.+/-]+))?(:(?P<file>[^:@]+\.gguf))?")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class HubId:
    """What ``owner/name@revision:file.gguf`` names: a repository of the hub, in the state of ``revision`` (a branch, tag or
    commit; None: the newest), and ``file``, or all files that a checkpoint in Hugging Face layout has.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """None if ``text`` is no hub id, such as ``folder/model.gguf``."""
        match = _HUB_ID.fullmatch(text)
        return None if match is None or match["repository"].lower().endswith(".gguf") else cls(**match.groupdict())

    @property
    def patterns(self) -> list[str]:
        """Of the files that are downloaded; all parts of a GGUF file that was split."""
        if self.file is None:
            return list(HUB_FILES)
        part = _PART.fullmatch(self.file)
        return [glob.escape(self.file)] if part is None else [f"{glob.escape(part[1])}-?????-of-{part[2]}.gguf"]


def hub_id_of(checkpoint: str) -> HubId | None:
    """What ``checkpoint`` names on the hub; None for a path.

    ``models/mine`` is a path if a folder ``models`` exists; so are ``./mine``, ``../mine`` and what exists.
    """
    path = _path(checkpoint)
    return None if path.exists() or path.parent.is_dir() else HubId.parse(checkpoint)


def resolve_checkpoint(model: str | None, checkpoint: str | None) -> Path:
    """The checkpoint's folder or GGUF file: ``checkpoint`` (a path, or a hub id ``owner/name[@revision][:file.gguf]``), else
    that of preset ``model``. An empty string counts as not given.

    A hub id is looked up, and downloaded if needed, by huggingface_hub with its cache, token, endpoint and offline mode.
    Raises ``UnknownNameError`` for an unknown model, ``UsageError`` if neither is given, ``MissingDependencyError`` for a
    preset that is not installed, and ``CheckpointError`` if there is no such path or the repository cannot be downloaded.
    """
    known = preset(model) if model else None
    if checkpoint:
        return _local_or_snapshot(checkpoint)
    if known is None:
        raise UsageError("no model is named", expected="MODEL or CHECKPOINT", fix="e.g. MODEL=llama3")
    return known.checkpoint()


def _path(checkpoint: str) -> Path:
    return Path(checkpoint).expanduser() if checkpoint.startswith("~/") else Path(checkpoint)


def _local_or_snapshot(checkpoint: str) -> Path:
    path = _path(checkpoint)
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    if path.exists():
        raise CheckpointError(
            f"{checkpoint} is a file", expected="a .gguf file, or the folder with config.json and the weights"
        )
    hub_id = hub_id_of(checkpoint)
    if hub_id is None:
        raise CheckpointError(
            f"no such checkpoint: {checkpoint!r}",
            got="a path that does not exist",
            expected="a checkpoint's folder, a .gguf file, or a hub id such as meta-llama/Llama-3.1-8B-Instruct[@REVISION]",
            fix="check the spelling; owner/name is read as a path if there is a folder called owner",
        )
    return _snapshot(hub_id)


def _snapshot(hub_id: HubId) -> Path:
    hub, errors = require("huggingface_hub"), require("huggingface_hub.errors")
    name = hub_id.repository
    try:
        folder = Path(hub.snapshot_download(name, revision=hub_id.revision, allow_patterns=hub_id.patterns))
    except errors.GatedRepoError as error:
        fix = f"accept its licence at https://huggingface.co/{name}, then run 'hf auth login'; or pass a folder"
        raise _not_available(name, "the repository is gated, and this account has no access", fix) from error
    except errors.RevisionNotFoundError as error:
        fix = f"take a branch, a tag or a commit of https://huggingface.co/{name}"
        raise _not_available(name, f"no revision {hub_id.revision!r}", fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the spelling; for a private repository run 'hf auth login'; or pass a folder"
        raise _not_available(name, "no such repository, or it is private", fix) from error
    except (errors.HTTPError, errors.XetDownloadError, errors.HFValidationError, OSError) as error:
        fix = (
            "pass a folder that holds the checkpoint, or run where the hub can be reached; "
            "HF_HUB_OFFLINE=1 works for a repository that is already in the cache"
        )
        raise _not_available(name, _first_lines(error), fix) from error
    if hub_id.file is None:
        if not (folder / "config.json").is_file():
            fix = f"if it holds GGUF files, name one of them: {name}:FILE.gguf"
            raise _not_available(name, "a repository without config.json", fix)
        return folder
    if not (folder / hub_id.file).is_file():
        raise _not_available(
            name, f"no file {hub_id.file!r} in it", f"see https://huggingface.co/{name}/tree/main for its files"
        )
    return folder / hub_id.file


def _not_available(hub_id: str, got: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"cannot get {hub_id!r} from the Hugging Face hub", got=got, expected="a repository or a cached copy", fix=fix
    )


def _first_lines(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(lines[:2])
