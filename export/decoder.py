"""Checkpoint -> decoder."""

import torch

from trt_kv.decoder import Decoder
from trt_kv.export.checkpoints.base import Checkpoint


def decoder_from_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Decoder:
    """The checkpoint's decoder in evaluation mode with weights of ``dtype`` on the CPU, without gradients.

    If the checkpoint already has ``dtype``, weights stay memory-mapped.
    """
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    decoder.load_state_dict({name: checkpoint.tensor(name).to(dtype) for name in checkpoint.tensor_names}, assign=True)
    return decoder.requires_grad_(False).eval()
