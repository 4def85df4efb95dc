"""A small random checkpoint with a chat template, and its engine."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from tests.chat_templates import CHATML, TOKENIZERS
from tests.engines import build_for_test, shared
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_without_floor

TOKENIZER = TOKENIZERS["byte-level"]
END = TOKENIZER.get_vocab()["<|im_end|>"]
VOCAB_SIZE = 337
MAX_POSITIONS = 2000


def write_chat_checkpoint(folder: Path) -> Path:
    """A random checkpoint of 2 layers with a byte-level tokenizer and the template ChatML; its config names </s> as the end."""
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, written once. Not to be changed: copy it first."""
    return shared(tmp_path_factory, "chat-checkpoint", write_chat_checkpoint)


def chat_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of it that keeps a third of the tokens of a prompt. Not to be changed: copy it first."""
    policy = dataclasses.replace(policy_without_floor("snapkv"), kept=0.34, window=4, recent=4)
    request = EngineRequest(checkpoint=open_checkpoint(chat_checkpoint(tmp_path_factory)), policy=policy, page_size=5)
    return shared(tmp_path_factory, "chat-engine", partial(build_for_test, request))
