"""What two results files beside ours say of the servers under load, as lines of the page: aiperf's report, and a soak's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import load, rounded

AIPERF_FILE, SOAK_FILE = "serving_aiperf.json", "soak.json"


def lines_of(folder: Path) -> list[str]:
    """A line for each of the files that are there."""
    told = {AIPERF_FILE: of_aiperf, SOAK_FILE: of_soak}
    return [tell(load(folder / name)) for name, tell in told.items() if (folder / name).exists()]


def of_aiperf(document: Mapping[str, Any]) -> str:
    """Throughput and latencies as aiperf reports them."""
    settings, report, machine = document["settings"], document["report"], document["machine"]
    first, between = (report[name] for name in ("time_to_first_token", "inter_token_latency"))
    tokens, requests = (rounded(report[name]["avg"]) for name in ("output_token_throughput", "request_throughput"))
    others = machine.get("cores_used_by_others", "an unknown number")
    return (
        f"* {settings['tool']}, {document['date'][:10]}, {others} cores used by other work: {settings['requests']} chats by "
        f"{settings['clients']} clients, {len(document['errors'])} errors, "
        f"{tokens} tokens/s, {requests} requests/s; first token {rounded(first['p50'] / 1e3)} s (95th percentile "
        f"{rounded(first['p95'] / 1e3)}), between tokens {rounded(between['p50'])} ms ({rounded(between['p95'])})."
    )


def of_soak(document: Mapping[str, Any]) -> str:
    """Answers of both servers, and what they held at first and in the end."""
    settings, servers = document["settings"], document["servers"]
    told = []
    for name, server in servers.items():
        later = server["silences"][settings["warm_up_rounds"] :]
        first, last = later[0], later[-1]
        kinds = ", ".join(f"{n} {kind}" for kind, n in server["answers"].items())
        told.append(
            f"{name}: {kinds}; {first['memory_mb']} MiB after the warm-up, {last['memory_mb']} at the end, threads "
            f"{first['n_threads']} and {last['n_threads']}, files {first['n_files']} and {last['n_files']}"
        )
    faults = f"{settings['minutes']:g} minutes, {len(document['faults'])} faults"
    return f"* `make soak`, {document['date'][:10]}, {faults}. {'. '.join(told)}."
