"""How much the report measures: everything, in half an hour on two cores, or a sample, in a minute."""

from benchmarks.quality.recall.results import HostPlan
from benchmarks.quality.settings import ContextPlan, Settings

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
FEW_SHARES = (0.1, 0.2, 0.5)
PRESETS = ("published", "ours")
EVERYTHING = (*PRESETS, "choice", "threshold", "ablation")

FULL_SETTINGS = Settings(
    contexts=(
        ContextPlan(context_length=512, documents_per_seed=8, budgets=FEW_SHARES, groups=PRESETS),
        ContextPlan(context_length=1024, documents_per_seed=9, budgets=SHARES, groups=EVERYTHING),
        ContextPlan(context_length=2048, documents_per_seed=5, budgets=FEW_SHARES, groups=PRESETS),
        ContextPlan(context_length=4096, documents_per_seed=2, budgets=FEW_SHARES, groups=PRESETS),
        ContextPlan(context_length=8192, documents_per_seed=2, budgets=FEW_SHARES, groups=PRESETS),
    ),
    main_context=1024,
    seeds=(0, 1, 2),
    follow_up_facts=8,
    most_facts=32,
    cue_length=16,
    copy_length=32,
    text_answer_length=32,
    capable_from=0.8,
    calibration_samples=10,
    calibration_context=1024,
    calibration_seed=0,
)
QUICK_SETTINGS = Settings(
    contexts=(ContextPlan(context_length=384, documents_per_seed=2, budgets=(0.2, 0.5), groups=EVERYTHING),),
    main_context=384,
    seeds=(0, 1),
    follow_up_facts=4,
    most_facts=32,
    cue_length=16,
    copy_length=16,
    text_answer_length=16,
    capable_from=0.8,
    calibration_samples=2,
    calibration_context=384,
    calibration_seed=0,
)

NEEDLES = ("needle_near", "needle_middle", "needle_far")
LATE = (*NEEDLES, "many", "distractors")
HOST_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
SWEPT_SHARES = (0.05, 0.2)
PUBLISHED_PAGE = 32
"""Page size of the published systems, in tokens; a small model with short contexts needs smaller ones."""

FULL_HOST_PLANS = (
    HostPlan(
        context_length=1024,
        page_size=8,
        tasks=(*LATE, "copy"),
        groups=("host", "mixture", "tau", "choosing", "exempt"),
        budgets=HOST_SHARES,
        sweep_budgets=SWEPT_SHARES,
    ),
    HostPlan(
        context_length=1024,
        page_size=8,
        tasks=("follow_up", "plain_text"),
        groups=("host", "mixture"),
        budgets=HOST_SHARES,
    ),
    HostPlan(
        context_length=1024,
        page_size=8,
        tasks=(*LATE, "copy", "follow_up", "plain_text"),
        groups=("combined",),
        budgets=HOST_SHARES,
    ),
    HostPlan(context_length=1024, page_size=16, tasks=(*LATE, "copy"), groups=("host",), budgets=FEW_SHARES),
    HostPlan(context_length=1024, page_size=PUBLISHED_PAGE, tasks=(*LATE, "copy"), groups=("host",), budgets=FEW_SHARES),
    HostPlan(context_length=2048, page_size=8, tasks=(*LATE, "follow_up"), groups=("host",), budgets=FEW_SHARES),
    HostPlan(context_length=4096, page_size=8, tasks=(*LATE, "follow_up"), groups=("host",), budgets=FEW_SHARES),
    HostPlan(context_length=8192, page_size=8, tasks=(*NEEDLES, "follow_up"), groups=("host",), budgets=FEW_SHARES),
    HostPlan(context_length=8192, page_size=PUBLISHED_PAGE, tasks=NEEDLES, groups=("host",), budgets=FEW_SHARES),
)
QUICK_HOST_PLANS = (
    HostPlan(
        context_length=384,
        page_size=8,
        tasks=(*LATE, "copy", "plain_text"),
        groups=("host", "mixture", "combined", "tau", "choosing", "exempt"),
        budgets=(0.2,),
        sweep_budgets=(0.2,),
    ),
)
