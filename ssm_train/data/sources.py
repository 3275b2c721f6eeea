"""What the names and paths of a config mean: which source a split has, which task reads it, and
both in one call: `load_task_data`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ssm_train.data import DataSettings
from ssm_train.data.cache import (
    TokenCache,
    default_cache_dir,
    describe_code,
    describe_files,
    describe_tokenizer,
)
from ssm_train.data.examples import (
    encode_records,
    make_dataset,
    make_encoder,
    render_records,
    tokenize_records,
)
from ssm_train.data.published import Published, download, find_split, match_files, read_files
from ssm_train.data.records import READERS, Records, expand_home
from ssm_train.data.tasks import PUBLISHED, TASKS, build_task, guess_task
from ssm_train.data.tasks.chat import ChatTask, bind_template, template_text
from ssm_train.data.tasks.corpus import CorpusTask
from ssm_train.data.tasks.quickstart import (
    generate_base,
    generate_quickstart,
    vocabulary_texts,
)
from ssm_train.data.tasks.random_tokens import check_split, random_chunk
from ssm_train.data.tasks.task import Task
from ssm_train.data.tokens import Chunk, TokenizedDataset
from ssm_train.errors import InputError, near

Generate = Callable[[str], Iterator[dict[str, Any]]]
Work = Callable[[], None]

GENERATED: dict[str, tuple[Task, Generate]] = {
    "quickstart": (TASKS["quickstart"], generate_quickstart),
    "quickstart_base": (TASKS["quickstart"], generate_base),
}
"""Name -> its task, and its records by split (train, val, test)."""

SPLITS = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "dev", "eval"),
    "test": ("test",),
}
"""Split -> the names that it has in a directory of files, the first one found."""

PLACES = (
    *("{stem}{suffix}", "{stem}-*{suffix}"),
    *("data/{stem}{suffix}", "data/{stem}-*{suffix}", "{stem}/*{suffix}"),
)
"""Where the files of a split are in a directory, or in a repository of the hub."""


@dataclass(frozen=True)
class Source:
    """The records of one split, to be read as often as needed."""

    name: str
    open: Callable[[], Records]
    peek: Callable[[], Records]
    """The same or more records, whose first one is there at once."""
    task: Task | None = None
    """The task that the data brings along."""
    files: tuple[Path, ...] = ()
    """What the records are read from; none: they are generated."""
    recipe: str = ""
    """What else decides which records these are."""
    random_length: int | None = None
    """Random tokens instead of records: so many an example."""


def load_task_data(
    settings: DataSettings,
    tokenizer: Any,
    split: str,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    once: Callable[[Work], None] = lambda work: work(),
    ask_nodes: Callable[[Callable[[], Any]], list[Any]] = lambda question: [question()],
) -> TokenizedDataset:
    """The examples of `split`: train (too long ones dropped, see `dropped`), val or test.

    What is read from files is tokenized once and kept (see cache.py). `limit`: only the first so
    many records. `progress` gets the number of records done, `say` what a person should read.
    `once` does work in one process while the others wait, `ask_nodes` gives the answers of one
    process a node to all. Raises InputError; the place of bad records is named.
    """
    training = split == "train"
    max_length = settings.max_length
    if settings.packing:
        max_length = min(max_length or settings.row_tokens, settings.row_tokens)
    source, task = find_source(settings, split), find_task(settings, split)
    if isinstance(task, ChatTask):
        task = bind_template(task, tokenizer)
    workers = settings.num_data_workers
    if source.random_length is None and not source.files:
        return tokenize_records(
            source.open(), task, tokenizer, training=training, max_length=max_length, limit=limit,
            num_workers=workers, progress=progress,
        )  # fmt: skip
    encoder = make_encoder(task, tokenizer, training=training, max_length=max_length)
    if source.random_length is not None:
        chunk = random_chunk(source.random_length, split, tokenizer, limit)
        return make_dataset(encoder, source.name, [chunk])

    def chunks() -> Iterator[Chunk]:
        return encode_records(encoder, source.open(), limit, workers, progress)

    files, *elsewhere = ask_nodes(lambda: describe_files(source.files))
    if any(others != files for others in elsewhere):
        raise InputError(f"data: the files of {source.name} are others on another node; copy them")
    given = settings.cache_dir
    root = expand_home(given, "cache_dir") if given else default_cache_dir()
    cache = TokenCache(
        root / "tokens",
        split,
        {
            "files": files,
            "recipe": source.recipe,
            "task": repr(task),
            "tokenizer": describe_tokenizer(tokenizer),
            "code": describe_code(),
            "training": training,
            "max_length": max_length if training else None,
            "limit": limit,
        },
    )
    once(lambda: cache.make(chunks, answers=not training, say=say))
    return make_dataset(encoder, source.name, cache.read())


def find_task(settings: DataSettings, split: str = "train") -> Task:
    """How the records of a split are read: the task that `task:` says, else its data set's own,
    else the training data's, whose field names may say it.

    Raises InputError.
    """
    if settings.task is not None:
        return build_task(settings.task)
    source = find_source(settings, split)
    if source.task is not None:
        return source.task
    if split != "train":
        return find_task(settings)
    _, record = next(iter(source.peek().rows), (0, {}))
    if (task := guess_task(record)) is not None:
        return task
    raise InputError(
        f"task is missing: how do the fields of {settings.data} become prompt and label? "
        f"Give a name ({', '.join(TASKS)}) or a mapping with type, prompt, ... (docs/data.md)"
    )


def find_chat_template(settings: DataSettings) -> str | None:
    """The chat template that the config's task brings along."""
    if not isinstance(settings.task, dict) or settings.task.get("type") != "chat":
        return None
    task = build_task(settings.task)
    assert isinstance(task, ChatTask)
    return template_text(task.template)


def find_source(settings: DataSettings, split: str) -> Source:
    """Where the records of a split are. Raises InputError when there are none such."""
    assert split in SPLITS, split
    name, key, way_out = settings.data, "data", f"set {split}_data"
    if split == "val":
        if settings.val_data is not None:
            name, key = settings.val_data, "val_data"
        split = settings.val_data_split
    elif split == "test" and settings.test_data is not None:
        name, key = settings.test_data, "test_data"
    if key == "data" and split != "train" and expand_home(name, key).is_file():
        raise InputError(f"data is the one file {name}, which has no {split!r} split; {way_out}")
    return resolve_source(name, split, key, settings.data_root)


def resolve_source(
    name: str, split: str, key: str = "data", data_root: str | None = None
) -> Source:
    """The source of a data set's name, a directory's split, a file or a hub data set; `key` is the
    config's."""
    dataset, size = split_name(name)
    if dataset in GENERATED:
        return _generated(name, dataset, split, size)
    if match := re.fullmatch(r"random_([1-9][0-9]{0,17})", name):
        return _random(name, int(match[1]), split)
    if dataset in PUBLISHED:
        return _published(name, PUBLISHED[dataset], split, data_root, size)
    path = expand_home(name, key)
    if path.is_file():
        if split not in SPLITS:
            known = ", ".join(SPLITS)
            raise InputError(f"{key}: the file {name} has no split {split!r}; known: {known}")
        return _of_files(name, (path,))
    if path.is_dir():
        return _of_files(name, _files_of_split(path, split))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in READERS:
        raise InputError(f"{key}: {name} is neither a file nor a data set name{_hint(name)}")
    stems = SPLITS.get(split, (split,))
    patterns = [p.format(stem=s, suffix=x) for p in PLACES for s in stems for x in READERS]
    return _of_files(name, _files_of_split(download(name, patterns, name), split))


def _hint(name: str) -> str:
    """The data sets that a wrong name may have meant: `rte` is a part of one's name."""
    names = [*GENERATED, *PUBLISHED, "random_<length>"]
    meant = [known for known in names if name.lower() in re.split("[-_]", known)]
    if 0 < len(meant) <= 3:
        return f"; did you mean {' or '.join(map(repr, meant))}?"
    return near(name.lower(), names) or f"; data set names: {', '.join(names)}"


def why_no_test(settings: DataSettings) -> str | None:
    """Why nothing is tested: the config names no test data, and its `data` brings none along.

    Data that is named is there to be read: if it cannot be, that is an error later.
    """
    if settings.test_data is None:
        try:
            find_source(settings, "test")
        except InputError as error:
            return str(error)
    return None


def check_data(settings: DataSettings, splits: tuple[str, ...] = ("train", "val")) -> Task:
    """Finds a user's mistakes before a model is loaded: the task, the files, and the first record
    of each split. Raises InputError; returns the task of the evaluation, else of the training."""
    tasks = {split: find_task(settings, split) for split in ("train", *splits)}
    for split in splits:
        source, task = find_source(settings, split), tasks[split]
        if source.random_length:
            continue
        records = source.peek()
        first = next(records.placed(), None)
        if first is None:
            raise InputError(f"{records.name} holds no records")
        next(render_records(task, [first], training=split == "train"))
    return tasks.get("val", tasks["train"])


def training_texts(settings: DataSettings) -> Iterator[str]:
    """What a new tokenizer is built from: the texts of the training records."""
    if split_name(settings.data)[0] in GENERATED:
        yield from vocabulary_texts()
    task, records = find_task(settings), find_source(settings, "train").open()
    for _, examples in render_records(task, records.placed(), training=True):
        yield from (segment.text for example in examples for segment in example.segments)


def split_name(name: str) -> tuple[str, int | None]:
    """`glue-tvt_rte_300` is 300 examples of `glue-tvt_rte`."""
    known: Mapping[str, Any] = GENERATED | PUBLISHED
    match = re.fullmatch(r"(.+)_([1-9][0-9]{0,17})", name)
    if match and match[1] in known:
        return match[1], int(match[2])
    return name, None


def _generated(name: str, dataset: str, split: str, size: int | None) -> Source:
    if split not in SPLITS:
        raise InputError(f"{name} has no split {split!r}; known: {', '.join(SPLITS)}")
    task, generate = GENERATED[dataset]
    where = f"{name} ({split})"

    def records() -> Records:
        rows = enumerate(generate(split), start=1)
        return Records(where, islice(rows, size if split == "train" else None))

    return Source(where, records, records, task)


def _random(name: str, length: int, split: str) -> Source:
    check_split(length, split)

    def refuse() -> Records:
        raise InputError(f"data: {name} has ids but no texts; set `tokenizer:` to an existing one")

    return Source(f"{name} ({split})", refuse, refuse, CorpusTask(), random_length=length)


def _published(
    name: str, published: Published, split: str, data_root: str | None, size: int | None
) -> Source:
    if size is not None:  # N training examples, a tenth as many for validation, all for the test
        size = {"train": size, "val": max(1, size // 10)}.get(split)
    found = find_split(published, name, split, data_root, size)
    recipe = f"{name} {split}"
    if published.holds_paths:
        recipe += f" {found.folder.resolve()}"
    return Source(
        f"{name} ({split})", found.open, found.open_official, published.task, found.depends_on,
        recipe,
    )  # fmt: skip


def _of_files(name: str, files: tuple[Path, ...]) -> Source:
    read = partial(read_files, files)
    return Source(name, read, read, None, files)


def _files_of_split(directory: Path, split: str) -> tuple[Path, ...]:
    stems = SPLITS.get(split, (split,))
    for stem in stems:
        for place in PLACES:
            for suffix in READERS:
                if found := match_files(directory, place.format(stem=stem, suffix=suffix)):
                    return found
    raise InputError(
        f"{directory} has no {split!r} file; expected {' or '.join(stems)} with one of "
        f"{' '.join(READERS)}"
    )
