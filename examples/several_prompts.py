"""Continue several prompts in one batch, print KV cache sizes: python examples/several_prompts.py ENGINE FILE..."""

import sys
from pathlib import Path

from trt_kv import Engine
from trt_kv.text_file import read_text


def main() -> None:
    """Read each FILE as one prompt; all of them share one batch."""
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/several_prompts.py ENGINE FILE...")
    folder, *files = sys.argv[1:]
    prompts = [read_text(Path(file), what="the file with the prompt") for file in files]
    engine = Engine.load(folder)
    for file, result in zip(files, engine.generate_batch(prompts, max_new_tokens=16, stop=(" .",)), strict=True):
        held = sum(result.kv_tokens) / len(result.kv_tokens)
        print(f"{file}: {result.text} [{held:.0f} of {result.num_computed_tokens} tokens held per layer]")


if __name__ == "__main__":
    main()
