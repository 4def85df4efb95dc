"""How much the report of a real model measures: everything, or a sample of it with the bundled model."""

from benchmarks.quality.real.settings import LengthPlan, RealSettings, TalkPlan

SHARES = (0.75, 0.5, 0.25, 0.125)
"""1 - the compression ratios of kvpress's leaderboard."""

FULL = RealSettings(
    lengths=(
        LengthPlan(n_tokens=1024, n_documents=20, budgets=SHARES),
        LengthPlan(n_tokens=2048, n_documents=10, budgets=SHARES),
        LengthPlan(n_tokens=4096, n_documents=6, budgets=SHARES),
    ),
    recall_budgets=(0.25,),
    capable_from=0.6,
    n_texts=20,
    text_tokens=65,
    talk=TalkPlan(n_tokens=640, n_documents=8, n_turns=20, budgets=(0.5,)),
    calibration_samples=5,
    calibration_tokens=1024,
    calibration_seed=0,
)
QUICK = RealSettings(
    lengths=(LengthPlan(n_tokens=384, n_documents=2, budgets=(0.5, 0.25)),),
    recall_budgets=(0.25,),
    capable_from=0.6,
    n_texts=2,
    text_tokens=17,
    talk=TalkPlan(n_tokens=256, n_documents=2, n_turns=3, budgets=(0.5,)),
    calibration_samples=2,
    calibration_tokens=384,
    calibration_seed=0,
)
