"""What a run has measured so far, and what follows for the next request."""

from typing import Any

import numpy as np

OUT_OF_TIME = "the time that the run was given was over"
TOO_LONG = "it took longer than"
Sample = dict[str, Any]


def key_of(subject: str, row: str, context: int, index: int) -> Sample:
    """The fields that every sample begins with."""
    return {"subject": subject, "row": row, "context": context, "round": index}


class History:
    """All samples, of this run or of an interrupted one that it continues."""

    def __init__(self, samples: list[Sample]) -> None:
        """What a run had no time for is forgotten."""
        samples[:] = [sample for sample in samples if sample.get("why") != OUT_OF_TIME]
        self.samples = samples

    def is_done(self, subject: str, row: str, context: int, index: int) -> bool:
        """Whether this request was answered, or one of an earlier round refused."""
        mine = [s for s in self._of(subject, row) if s["context"] == context]
        return any("why" in s or ("token_ms" in s and s["round"] == index) for s in mine)

    def expected_s(self, subject: str, row: str, context: int) -> float:
        """Seconds to read a prompt: a power of its length between the first and the second, by the two longest ones that were
        read, or the first if only one was; 0 if none was.
        """
        read = {int(s["context"]): float(s["first_token_s"]) for s in self._of(subject, row) if s.get("first_token_s")}
        if not read:
            return 0.0
        lengths = sorted(read)
        shorter, longest = lengths[-2:][0], lengths[-1]
        power = 1.0
        if shorter < longest:
            power = np.clip(np.log(read[longest] / read[shorter]) / np.log(longest / shorter), 1.0, 2.0)
        return float(read[longest] * (context / longest) ** power)

    def took_too_long(self, subject: str, row: str, context: int) -> bool:
        """Whether a prompt of at most ``context`` tokens did."""
        return any(s["context"] <= context and TOO_LONG in s.get("why", "") for s in self._of(subject, row))

    def _of(self, subject: str, row: str) -> list[Sample]:
        return [s for s in self.samples if s["subject"] == subject and s["row"] == row]
