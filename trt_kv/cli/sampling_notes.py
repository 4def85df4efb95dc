"""What is printed of a generation's sampling: where its parameters come from, its samples, its log-probabilities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_kv.printable import printable
from trt_kv.text_file import shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trt_kv.runtime.generation import Generation
    from trt_kv.runtime.sampling import SamplingParams
    from trt_kv.runtime.sampling.model_defaults import ModelDefaults


def defaults_notes(defaults: "ModelDefaults", params: "SamplingParams", *, given: Sequence[str]) -> list[str]:
    """Lines on what the model's ``generation_config.json`` does to a request that gave the fields ``given`` itself."""
    notes = []
    if used := defaults.in_force(params, given):
        told = ", ".join(f"{name} {_shown(value)}" for name, value in used.items())
        how = "--temperature 0 for greedy" if "temperature" in used else "--no-model-defaults to ignore it"
        notes.append(f"[{told} from generation_config.json; {how}]")
    if defaults.ignored:
        told = ", ".join(f"{name} {_shown(value)}" for name, value in defaults.ignored.items())
        notes.append(f"[not supported, and ignored: {told} of generation_config.json]")
    return notes


def samples_text(result: "Generation") -> str:
    """Each sample below a line with its number and seed."""
    n = len(result.samples)
    return "\n".join(f"--- sample {i} of {n}, seed {one.seed}\n{one.text}" for i, one in enumerate(result.samples, start=1))


def logprobs_text(result: "Generation", tokenizer: "Tokenizer") -> str:
    """A table of each sample, after an empty line."""
    heads = [f"sample {i}:\n" for i in range(1, len(result.samples) + 1)] if result.others else [""]
    return "".join(f"\n\n{head}{logprobs_table(one, tokenizer)}" for head, one in zip(heads, result.samples, strict=True))


def logprobs_table(result: "Generation", tokenizer: "Tokenizer") -> str:
    """A line per token: its log-probability, the token, and the likeliest tokens in its place with theirs."""

    def named(token_id: int) -> str:
        return printable(repr(tokenizer.decode([token_id], skip_special_tokens=False)))

    lines = [("logprob", "id", "token", "likeliest")]
    lines += [
        (
            f"{of_token.logprob:.3f}",
            str(of_token.token_id),
            named(of_token.token_id),
            "  ".join(f"{named(token_id)} {logprob:.3f}" for token_id, logprob in of_token.top),
        )
        for of_token in result.logprobs
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{logprob:>{widths[0]}}  {token_id:>{widths[1]}}  {token:<{widths[2]}}  {top}".rstrip()
        for logprob, token_id, token, top in lines
    )


def _shown(value: object) -> str:
    return printable(shortened(str(value)))
