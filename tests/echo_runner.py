"""A runner of the benchmark ``peers`` without a model: it answers, refuses or dawdles as its options say."""

import os
import time

from benchmarks.peers.protocol import Answer, Job, Setup
from benchmarks.peers.serving import CannotDoError, Run, serve


def set_up(setup: Setup) -> tuple[dict[str, object], Run]:
    """``setup.model`` says how it behaves."""
    os.write(1, b"libraries write to standard output\n")
    if setup.model == "broken":
        raise CannotDoError("no such model")

    def run(job: Job) -> Answer:
        if setup.model == "slow":
            time.sleep(60)
        if setup.model == "dies":
            os._exit(3)
        if job.synthetic:
            raise CannotDoError("it reads every prompt")
        return Answer(first_token_s=0.5, token_ms=[float(job.seed)] * job.n_tokens)

    return {"version": "1"}, run


if __name__ == "__main__":
    serve(set_up)
