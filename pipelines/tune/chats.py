"""The instruction set as a file of chat messages, for other trainers: one row is one conversation. `llmlab data export`"""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import ConfigError
from pipelines.tune import data
from pipelines.tune.groups import training_groups

WRITERS = {".jsonl": "to_json", ".csv": "to_csv", ".parquet": "to_parquet"}
QUESTIONS_PER_GROUP = 6
SEED = 7


def export(name: str, examples: int, file: Path) -> int:
    """Write training examples of an instruction set and return their number.

    Args:
        name: a configuration in configs/data.
        examples: how many.
        file: its suffix chooses the format: .jsonl, .csv or .parquet.

    Raises:
        ConfigError: the suffix is none of these, or the folder does not exist.
    """
    from datasets import Dataset

    writer = WRITERS.get(file.suffix)
    if writer is None or not file.parent.is_dir():
        raise ConfigError(f"cannot write {file}", f"a file in an existing folder that ends with {', '.join(WRITERS)}")
    config = data.load_reader(name)
    corpus, _ = data.corpora(config)
    groups = training_groups(config, corpus, -(-examples // QUESTIONS_PER_GROUP), QUESTIONS_PER_GROUP, SEED)
    rows = [{"messages": list(e.row.messages)} for group in groups for e in group][:examples]
    getattr(Dataset.from_list(rows), writer)(str(file))
    return len(rows)
