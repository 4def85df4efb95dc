"""What a run measures, and its sizes."""

from dataclasses import dataclass

from benchmarks.serving_peers.rows import EVICTING, ROWS

MIB = 2**20
SMOLLM2 = "smollm2"
CONCURRENCY, MEMORY, DOORS = "concurrency", "memory", "doors"
"""Parts of a run: every row against the number of clients; in equal memory; our own doors beside the engine in process."""
IN_MEMORY = (
    "trt-kv full, int8 cache",
    "trt-kv pooledwindow 20 %, int8 cache",
    "trt-kv pooledwindow 20 %, evicting while reading, int8 cache",
    "llama.cpp, q8_0 cache",
    "OpenVINO GenAI",
    "OpenVINO GenAI, its eviction to 20 %",
    "onnxruntime-genai, one at a time",
)
"""Rows in equal memory: the cache of each in 8 bits, where there is that choice."""
AT_CLIENTS = tuple(name for name in ROWS if name != "llama.cpp, q8_0 cache")
IN_PROCESS, HTTP, TRITON = "in process", "HTTP", "Triton"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Lengths in tokens; ``*_prompt`` of prompts, ``*_tokens`` of answers. ``memory_mib``: of everybody's KV cache."""

    clients: tuple[int, ...] = (1, 4, 16, 32)
    requests_each: int = 2
    prompt: int = 512
    tokens: int = 64
    rows: tuple[str, ...] = AT_CLIENTS
    memory_clients: int = 16
    memory_requests: int = 16
    memory_prompt: int = 4096
    memory_tokens: int = 256
    memory_mib: int = 288
    memory_rows: tuple[str, ...] = IN_MEMORY
    door_clients: tuple[int, ...] = (1, 16)
    door_rounds: int = 5
    door_prompt: int = 128
    door_tokens: int = 64


FULL = Sizes()
SHORT = Sizes(
    requests_each=1,
    prompt=64,
    tokens=24,
    rows=tuple(name for name in AT_CLIENTS if not name.endswith("int8 cache") and name != EVICTING),
    memory_prompt=1024,
    memory_tokens=64,
    memory_mib=80,
    memory_rows=tuple(name for name in IN_MEMORY if name != "trt-kv full, int8 cache"),
    door_rounds=3,
    door_prompt=64,
    door_tokens=32,
)
"""About eleven minutes on two cores. With prompts of 64 tokens OpenVINO's eviction would have nothing to do."""
TINY = Sizes(
    clients=(1, 2),
    requests_each=1,
    prompt=32,
    tokens=4,
    memory_clients=3,
    memory_requests=3,
    memory_prompt=256,
    memory_tokens=8,
    memory_mib=24,
    door_clients=(2,),
    door_rounds=1,
    door_prompt=32,
    door_tokens=8,
)
"""To try the benchmark itself."""
SIZES = {"full": FULL, "short": SHORT, "tiny": TINY}
PARTS = (CONCURRENCY, MEMORY, DOORS)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``sizes``: a name of ``SIZES``. ``parts`` to measure, and ``rows``; empty: those of the sizes. ``minutes``: after them
    nothing new is begun. ``model``: a name of ``SUBJECTS``.
    """

    sizes: str
    model: str = SMOLLM2
    parts: tuple[str, ...] = PARTS
    rows: tuple[str, ...] = ()
    threads: int
    minutes: float

    @property
    def of(self) -> Sizes:
        return SIZES[self.sizes]

    def chosen(self, rows: tuple[str, ...]) -> list[str]:
        return [row for row in rows if not self.rows or row in self.rows]
