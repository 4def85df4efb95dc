"""Architectures that are refused by name: why, and what to do instead."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """``why``: what these models have that the decoder has not. ``fix``: what to do. ``model_types``: as in ``config.json``."""

    why: str
    fix: str
    model_types: frozenset[str]


_DENSE = "take a dense model of the same size class; docs/models.md lists the families"
_TEXT = "save the text model by itself, if it is of a supported family: docs/models.md"

REFUSALS = (
    Refusal(
        why="latent attention (MLA), whose cache holds no keys and values per head",
        fix="take a model with grouped-query attention, such as its distillations into Llama or Qwen2; docs/models.md",
        model_types=frozenset(
            "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 kimi_k2 kimi_k25 minicpm3 longcat_flash mistral4 "
            "glm4_moe_lite glm_moe_dsa youtu".split()
        ),
    ),
    Refusal(
        why="a mixture of experts (MoE)",
        fix=_DENSE,
        model_types=frozenset(
            "mixtral qwen2_moe qwen3_moe gpt_oss phimoe granitemoe granitemoeshared olmoe flex_olmo dbrx jetmoe arctic grok-1 "
            "ernie4_5_moe glm4_moe hunyuan_v1_moe minimax minimax_m2 dots1 llama4_text exaone_moe cohere2_moe afmoe "
            "solar_open".split()
        ),
    ),
    Refusal(
        why="recurrent, linear or hybrid attention, whose state is not a KV cache",
        fix=_DENSE,
        model_types=frozenset(
            "mamba mamba2 falcon_mamba jamba bamba zamba zamba2 recurrent_gemma granitemoehybrid qwen3_next qwen3_5 "
            "qwen3_5_text qwen3_5_moe lfm2 lfm2_moe falcon_h1 nemotron_h rwkv xlstm kimi_linear olmo_hybrid retnet "
            "bailing_hybrid".split()
        ),
    ),
    Refusal(
        why="a vision or audio tower: its prompts are not token ids alone",
        fix=_TEXT,
        model_types=frozenset(
            "llava llava_next llava_onevision vipllava video_llava qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen2_audio "
            "qwen2_5_omni qwen3_omni_moe gemma3 gemma3n gemma4 mllama llama4 mistral3 pixtral idefics idefics2 idefics3 "
            "smolvlm paligemma phi4_multimodal phi3_v internvl internvl_chat minicpmv fuyu kosmos-2 granite_speech "
            "granite4_vision voxtral aria molmo2 blip-2 instructblip glm4v cohere2_vision deepseek_vl deepseek_vl_v2".split()
        ),
    ),
    Refusal(
        why="an encoder, with or without a decoder: it does not generate from a causal KV cache alone",
        fix="take a decoder-only model; docs/models.md lists the families",
        model_types=frozenset(
            "bert roberta distilbert albert electra deberta deberta-v2 modernbert xlm-roberta mpnet nomic_bert eurobert "
            "t5 mt5 umt5 longt5 t5gemma bart mbart pegasus m2m_100 marian blenderbot whisper speech_to_text "
            "switch_transformers encoder-decoder led prophetnet".split()
        ),
    ),
)


def refuse_unsupported(data: Mapping[str, Any], source: str) -> None:
    """Raise ``CheckpointError`` with the reason if the architecture of ``config.json`` is one that is refused by name."""
    model_type = data.get("model_type")
    for refusal in REFUSALS:
        if isinstance(model_type, str) and model_type in refusal.model_types:
            raise CheckpointError(
                f"{source} is of an architecture that trt-kv does not support: it has {refusal.why}",
                got=f"model_type {model_type!r}",
                expected="a decoder-only text model with softmax attention and a dense MLP",
                fix=refusal.fix,
            )
