"""``python -m trt_kv``: the command ``trt-kv``, for environments whose scripts are not on the PATH."""

import sys

from trt_kv.cli import main

if __name__ == "__main__":
    sys.exit(main())
