"""What of a policy TensorRT-LLM can do, as options of its LLM API, and what is lost on the way.

TensorRT-LLM runs checkpoints in Hugging Face layout on its PyTorch backend; its attention and its cache have no place for our
ops. So a policy is not exported: the nearest thing there is configured, or the policy is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import UsageError
from trt_kv.export.targets.tensorrt_llm_fields import check_options
from trt_kv.layer_budget import LayerBudget
from trt_kv.model_config import ModelConfig
from trt_kv.policy import Policy

TRIATTENTION_PERIOD = 128
"""Generated tokens between two evictions (``beta``): TensorRT-LLM's default."""
CALIBRATION_FILE = "triattention.pt"
GROUPS = (4, 8)
"""Query heads per KV head that its TriAttention has kernels for."""
_SOURCE_OF_LIMITS = "examples/kv_cache_compression/triattention.md of TensorRT-LLM"


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """``options``: of the LLM API. ``losses``: how they differ from the policy. ``needs_queries``: whether a file of query
    statistics belongs to them.
    """

    options: dict[str, Any]
    losses: tuple[str, ...]
    needs_queries: bool = False


def hand_over_of(
    config: ModelConfig,
    policy: Policy,
    budgets: Sequence[LayerBudget],
    *,
    context: int,
    page_size: int,
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> HandOver:
    """The nearest options to ``policy``, with ``budgets`` per layer, for texts of ``context`` tokens.

    Raises ``UsageError``, with the reason, for a policy that TensorRT-LLM has nothing like.
    """
    applied = policy.applied_to(config.windows)
    cache: dict[str, Any] = {"enable_block_reuse": True, "tokens_per_block": _block(page_size), "dtype": _cache_dtype(kv_dtype)}
    options: dict[str, Any] = {
        "backend": "pytorch",
        "dtype": dtype or "auto",
        "max_seq_len": context,
        "kv_cache_config": cache,
    }
    losses, needs_queries = _options_of(applied, config, budgets, context, options)
    check_options(options)
    return HandOver(options=options, losses=tuple(losses), needs_queries=needs_queries)


def _options_of(
    policy: Policy, config: ModelConfig, budgets: Sequence[LayerBudget], context: int, options: dict[str, Any]
) -> tuple[list[str], bool]:
    """Add what ``policy`` becomes to ``options``; the losses, and whether query statistics are needed."""
    if policy.draws:
        raise _nothing_like(
            policy, "pages of generated tokens that are drawn at random", "take decode=rank, which becomes TriAttention"
        )
    if not (policy.evicts or policy.recalls):
        return ["nothing of the policy: it keeps every token, and so does TensorRT-LLM"], False
    if policy.recalls:
        raise _nothing_like(
            policy,
            "a cache on the host from which pages are recalled in each step: host_cache_size is for reuse of prefixes and for "
            "requests that wait, and what attention reads is on the GPU",
            "take a policy that drops tokens, or run the engine with --device cuda",
        )
    if policy.budget in ("unimetric", "above"):
        raise _nothing_like(policy, "budgets that are found from each prompt", "take a constant or uniform budget")
    if policy.score == "position":
        return _windows(policy, config, budgets, context, options), False
    if len({budget.of(context) for budget in budgets}) > 1:
        raise _nothing_like(
            policy,
            "a budget of its own for each layer if tokens are ranked by a score: only windows are set per layer",
            "take budget=uniform or constant, without exempt layers; with score=position budgets become windows",
        )
    if policy.decode == "rank":
        return _triattention(policy, config, budgets[0].of(context), options), True
    if policy.reads_attention:
        return _rocket(policy, budgets[0].of(context), options), False
    raise _nothing_like(policy, f"score {policy.score} without eviction while decoding", "take --set decode=rank")


def _windows(
    policy: Policy, config: ModelConfig, budgets: Sequence[LayerBudget], context: int, options: dict[str, Any]
) -> list[str]:
    if policy.sinks:
        raise _nothing_like(
            policy,
            f"a window that keeps the first {policy.sinks} tokens: sink_token_length is ignored by the PyTorch backend",
            "--set sinks=0 keeps a window alone, which costs the accuracy that sinks are for",
        )
    if policy.decode != "rank":
        raise _nothing_like(
            policy, "a window of the prompt after which generated tokens are all kept", "--set decode=rank slides the window"
        )
    windows = config.windows or (0,) * config.n_layers
    lengths = [min(window or context, budget.of(context), context) for window, budget in zip(windows, budgets, strict=True)]
    options["kv_cache_config"]["max_attention_window"] = lengths
    return [
        f"windows are numbers of tokens, computed for {context}: at other lengths the policy keeps another number",
        "a window bounds attention while the prompt is read, too; here the whole prompt attends before tokens are dropped",
        "what is in the window is recent, not important: this is the order of score=position only",
    ]


def _triattention(policy: Policy, config: ModelConfig, budget: int, options: dict[str, Any]) -> list[str]:
    group = config.n_heads // config.n_kv_heads
    reasons = {
        f"{group} query heads per KV head; its kernels are for {' or '.join(map(str, GROUPS))}": group not in GROUPS,
        "layers without RoPE, or with another one": bool(config.unrotated_layers or config.local_rope),
        "a RoPE that turns a part of each head": config.rope.rotary_dim not in (0, config.head_dim),
        "layers with an attention window": any(config.windows),
    }
    if any(reasons.values()):
        raise UsageError(
            "TensorRT-LLM's TriAttention does not run this model",
            got="; ".join(reason for reason, applies in reasons.items() if applies),
            expected=f"what {_SOURCE_OF_LIMITS} lists",
            fix="take another policy, or --policy full",
        )
    options["dtype"] = "bfloat16"
    options["kv_cache_config"]["use_kv_cache_manager_v2"] = True
    options["kv_cache_compression_config"] = {
        "algorithm": "triattention",
        "budget": budget,
        "beta": TRIATTENTION_PERIOD,
        "eviction_mode": "per_layer_perhead" if policy.heads != "shared" else "union",
        "calibration_path": CALIBRATION_FILE,
    }
    return [
        f"another score: TriAttention's, from the statistics of queries in {CALIBRATION_FILE}, in place of {policy.score}",
        "the prompt is never evicted: the budget is of generated tokens alone, so long prompts take all of their memory",
        f"tokens are evicted every {TRIATTENTION_PERIOD} generated ones, not with each",
        "the same budget in every layer; protected sinks and newest tokens are not set",
        "it needs a Blackwell GPU (SM100), bfloat16, one GPU and the KV cache manager V2",
    ]


def _rocket(policy: Policy, budget: int, options: dict[str, Any]) -> list[str]:
    options["enable_chunked_prefill"] = False
    options["kv_cache_config"]["enable_block_reuse"] = False
    options["sparse_attention_config"] = {
        "algorithm": "rocket",
        "prompt_budget": budget,
        **({"window_size": policy.window} if "window" in policy.scoring.settings else {}),
        **({"kernel_size": policy.pooling} if policy.pooling > 1 else {}),
    }
    return [
        f"another method: here score {policy.score} keeps {budget} tokens of a prompt, and all of them are read in each step",
        "RocketKV keeps those with most attention from its last queries, and reads a part of them (topk, at its default)",
        "the budget is of a prompt of the longest context; shares of shorter prompts are not kept",
        "generated tokens are all kept",
        "it needs a Blackwell GPU (SM100), and works without block reuse and chunked prefill",
    ]


def _nothing_like(policy: Policy, what: str, fix: str) -> UsageError:
    return UsageError(f"TensorRT-LLM has nothing like policy {policy.name!r}", got=what, expected="a policy that maps", fix=fix)


def _block(page_size: int) -> int:
    if page_size & (page_size - 1):
        raise UsageError(
            "TensorRT-LLM's blocks are powers of 2", got=f"--page-size {page_size}", expected="a power of 2", fix="e.g. 32"
        )
    return page_size


def _cache_dtype(kv_dtype: str | None) -> str:
    if kv_dtype == "int8":
        raise UsageError(
            "TensorRT-LLM's PyTorch backend has no KV cache in int8",
            got="--kv-dtype int8",
            expected="float32, float16 or bfloat16",
            fix="leave it out, and set kv_cache_config.dtype to fp8 yourself if its accuracy is enough",
        )
    return kv_dtype or "auto"
