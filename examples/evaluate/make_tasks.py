"""Generate the tasks file of this folder: python examples/evaluate/make_tasks.py > examples/evaluate/tasks.jsonl."""

import json

from trt_kv.calibration.tasks import REGIONS, evaluation_tasks

TASKS_PER_REGION = 10


def main() -> None:
    """Print questions about facts in the near, middle and far third of documents that no recipe was calibrated on."""
    for region in REGIONS:
        for task in evaluation_tasks(TASKS_PER_REGION, context_length=256, n_facts=8, distance=region):
            line = {"task": region, "name": f"{region} {task.index}", "prompt": task.prompt, "expected": task.answer}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
