"""How OpenMP's threads wait is set for commands, and left to the user who has said it."""

import pytest

from trt_kv.openmp import WAITING, let_threads_wait


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "0"}])
def test_the_environment_wins(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(said)
    monkeypatch.setattr("os.environ", environment)
    let_threads_wait()
    assert environment == (said or WAITING)
