"""Before a server takes requests: kernels are compiled at their first call, which is not the first client's to wait for."""

from trt_kv.runtime.engine import Engine


def generate_first_tokens(engine: Engine) -> None:
    """Two tokens, the likeliest and sampled ones."""
    for temperature in (0.0, 1.0):
        engine.generate([0], max_new_tokens=2, ignore_eos=True, temperature=temperature, top_p=0.9, seed=0)
