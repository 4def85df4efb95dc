"""Checkpoint + policy -> monolithic ONNX graphs, without building an engine."""

from pathlib import Path

from trt_kv.pipeline.callbacks import OnNote, OnProgress, ignore
from trt_kv.pipeline.given_files import drift_of_plan, policy_of_recipe, recipe_for_policy
from trt_kv.pipeline.requests import ExportRequest
from trt_kv.pipeline.sources import open_source


def export_graphs(request: ExportRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> list[Path]:
    """Write the monolithic graphs into the new folder ``request.out`` and return their paths.

    Raises ``UsageError`` if something is there, ``CheckpointError`` and ``RecipeError`` for what does not fit together.

    Example::

        from pathlib import Path

        from trt_kv.pipeline import ExportRequest, ModelSource, export_graphs
        from trt_kv.policies import policy_from_name

        source, policy = ModelSource(model="llama3"), policy_from_name("full")
        decode, prefill = export_graphs(ExportRequest(source=source, policy=policy, out=Path("graphs/full")))
    """
    from trt_kv.export import engine
    from trt_kv.export.new_folder import new_folder
    from trt_kv.runtime.processes import will_compute

    will_compute()
    recipe = recipe_for_policy(request.recipe, request.policy) if request.recipe is not None else None
    checkpoint = open_source(request.source, on_note)
    policy = request.policy if recipe is None else policy_of_recipe(request.policy, recipe, on_note)
    drift = drift_of_plan(policy.applied_to(checkpoint.config.windows), request.drift, on_note)
    graphs = engine.EngineRequest(checkpoint=checkpoint, policy=policy, recipe=recipe, drift=drift)
    with new_folder(request.out) as folder:
        engine.export_graphs(graphs, folder, on_progress)
    return sorted(request.out.glob("*.onnx"))
