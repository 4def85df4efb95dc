"""What is said about a checkpoint's tokenizer when an engine is built from it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trt_kv.chat.templates import CONFIG_FILE
from trt_kv.errors import CheckpointError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, read_json

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint


def tokenizer_notes(checkpoint: "Checkpoint") -> Iterator[str]:
    """A note if ``tokenizer_config.json`` says otherwise than ``tokenizer.json`` what is put around a prompt.

    The post-processor of ``tokenizer.json`` counts, as in transformers 5.
    """
    from trt_kv.runtime.text.tokenizer import load_tokenizer

    path = checkpoint.tokenizer_files.get(CONFIG_FILE)
    if path is None:
        return
    config = read_json(path, kind="tokenizer's settings", error=CheckpointError, max_bytes=MAX_DOCUMENT_BYTES)
    flags = {name: config.get(name) for name in ("add_bos_token", "add_eos_token")} if isinstance(config, dict) else {}
    if not any(isinstance(flag, bool) for flag in flags.values()):
        return
    tokenizer = load_tokenizer(checkpoint.tokenizer_file, error=CheckpointError)
    mask = tokenizer.encode("a").special_tokens_mask
    found = {"add_bos_token": mask[:1] == [1], "add_eos_token": mask[-1:] == [1]}
    for name, flag in flags.items():
        if isinstance(flag, bool) and flag != found[name]:
            where = "in front of" if name == "add_bos_token" else "behind"
            what = "a token" if found[name] else "no token"
            yield (
                f"note: {CONFIG_FILE} has {name} {str(flag).lower()}, but tokenizer.json puts {what} {where} a prompt: "
                "so do engines, as transformers does"
            )
