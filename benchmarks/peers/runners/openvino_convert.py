"""``python -m benchmarks.peers.runners.openvino_convert FILE.gguf FOLDER``: OpenVINO GenAI's own conversion, kept on disk.

The pipeline converts a GGUF file whenever it opens one, and saves the result beside it if it is asked to.
"""

import sys
from pathlib import Path

import openvino_genai as genai


def main(gguf: str, folder: str) -> None:
    """Write the model and its tokenizer in OpenVINO's format."""
    link = Path(folder) / "model.gguf"
    link.symlink_to(Path(gguf).resolve())
    genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    link.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
