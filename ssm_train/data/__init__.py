"""From files to batches: tasks and text formats, order, packing, collation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ssm_train.settings import Settings


class DataSettings(Settings):
    """Which examples, and how they become batches."""

    data: str
    """A JSONL/JSON/CSV/TSV/Parquet file, a directory of train/val/test files, the name of a data
    set (docs/data.md) such as "glue-tvt_rte", or a hub data set of such files (owner/name)."""
    data_root: str | None = None
    """Directory with local copies of published data sets; its default is the variable
    SSM_TRAIN_DATA; None: they come from the hub."""
    cache_dir: str | None = None
    """Where tokenized data is kept; its default is the variable SSM_TRAIN_CACHE; None: ssm_train in
    the user's cache directory."""
    val_data: str | None = None
    """Evaluation data; None: the evaluation split of `data`."""
    val_data_split: str = "val"
    """Split of `val_data` to evaluate on."""
    test_data: str | None = None
    """Evaluated once, at the end of training; None: the test split of `data`, where it has one."""
    task: str | dict[str, Any] | None = None
    """How fields become prompt and label: a task name or {type, prompt, label, ...}; None: the data
    set's own, or by the fields' usual names (messages; prompt and completion; text)."""
    batch_size: int = Field(default=4, ge=1)
    """Examples in a micro-batch of one process."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    """Examples in an evaluation batch of one process; None: twice `batch_size`."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest example in tokens; longer ones are dropped from training, and counted."""
    packing: bool = False
    """Pack documents into rows of `tokens_per_batch` tokens; state resets between documents."""
    packing_check: bool = True
    """Prove on two documents, before training, that packed they are as alone."""
    tokens_per_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = 16_384
    """Tokens in a packed micro-batch of one process; auto: as many as fit into the GPU's free
    memory (`ssm-train plan`), at most 65,536; on a CPU the default."""
    group_by_length: bool = True
    """Batches of similar lengths: less padding, same examples per epoch."""
    num_data_workers: int = Field(default=8, ge=0)
    """Processes that tokenize large data; the batches are made by the training process."""
    seed: int = Field(default=42, ge=0)
    """Data order, initialisation and dropout."""

    @property
    def row_tokens(self) -> int:
        """`tokens_per_batch` of a run, where `auto` has become a number."""
        assert isinstance(self.tokens_per_batch, int), "plan.settle_tokens comes first"
        return self.tokens_per_batch
