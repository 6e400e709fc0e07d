"""What a test reads from the files of a W&B run, and how it ends one."""

import json
from pathlib import Path
from typing import Any

import wandb

from mmtrain.reporting.wandb_files import history, records


def close() -> None:
    """End the run and wait until everything is on disk; `finish` alone returns before."""
    wandb.finish()
    wandb.teardown()


def read_file(path: Path) -> dict[str, Any]:
    """`config`, `summary`, `history`, and of the run its `id`, `name`, `project`, `group`, `job_type` and `tags`."""
    found: dict[str, Any] = {"config": {}, "summary": {}, "history": history(path)}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"id": run.run_id, "name": run.display_name, "project": run.project, "tags": set(run.tags)}
            found |= {"group": run.run_group, "job_type": run.job_type}
        updates = {"run": record.run.config.update, "config": record.config.update}.get(kind, ())
        found["config"] |= {item.key: json.loads(item.value_json) for item in updates}
        if kind == "summary":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
            found["summary"] |= {key: json.loads(value) for key, value in items.items()}
    return found
