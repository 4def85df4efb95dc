"""``python -m benchmarks.peers.runners.onnxruntime_convert MODEL PRECISION OUT``: onnxruntime-genai's own model builder.

MODEL is a folder in Hugging Face layout. Its model alone is written: token ids come from the benchmark.
"""

import subprocess
import sys
import tempfile


def main(model: str, precision: str, out: str) -> None:
    """Write the model for the CPU."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out]
        subprocess.run([*command, "-p", precision, "-e", "cpu", "-c", cache], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
