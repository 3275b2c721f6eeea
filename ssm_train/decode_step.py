"""Decoding token by token with states in tensors that stay, so that on a GPU a token is the replay
of one CUDA graph: launching its thousands of small kernels is paid once for all tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train.adapters.modules import CACHE_NAMES
from ssm_train.recording import NotRecorded, record

Place = tuple[Any, Any]
"""A container inside a cache, and the key of a state in it: a tensor [B, ...], or None before the
prompt."""
FindPlaces = Callable[[Any], Iterable[Place]]
"""The `state_places` of a model's class: where its caches keep states, in an order that is one.
Its forward then knows no more of the past than these states: a token after the prompt needs no
attention mask."""


@contextmanager
def decoding_steps(model: nn.Module, rows: int, record: bool) -> Iterator[None]:
    """Inside, `generate` of a model with `state_places` takes each token after the prompt through a
    `DecodingStep`, others go on as they are. The prompt runs as it is, with its padding.

    `rows`: most rows that a batch will have, a row for each beam; smaller ones are padded to it, so
    that one recording serves all. Graphs and states are freed at the end.
    """
    find_places = getattr(type(model), "state_places", None)
    if find_places is None:
        yield
        return
    forward: Any = model.forward
    replaced = model.__dict__.get("forward")  # an engine may have put its own there
    step = DecodingStep(forward, find_places, rows, record)

    @wraps(forward)  # `generate` looks at its signature
    def prompt_or_step(input_ids: Tensor | None = None, **inputs: Any) -> Any:
        name = next((name for name in CACHE_NAMES if inputs.get(name) is not None), None)
        if name is None or input_ids is None or not has_states(find_places(inputs[name])):
            return forward(input_ids=input_ids, **inputs)
        return step(input_ids, name, inputs[name])

    model.forward = prompt_or_step
    try:
        yield
    finally:
        del model.forward
        if replaced is not None:
            model.forward = replaced
        if step.failure is not None:
            warnings.warn(
                f"no CUDA graphs while decoding, kernels are launched one by one: {step.failure}",
                stacklevel=3,
            )


class DecodingStep:
    """One token a row through the model: states are read from and written to tensors that stay.

    The first token on a GPU runs as it is, which compiles and tunes kernels, the second is
    recorded, and from then on the recording is replayed. States that are not in our tensors, those
    of a prompt or what beam search has reordered, are copied into them first.
    """

    failure: str | None = None
    """Why recording failed: then every token runs as it is."""

    def __init__(
        self, forward: Callable[..., Any], find_places: FindPlaces, rows: int, record: bool
    ) -> None:
        self.forward, self.find_places = forward, find_places
        self.rows, self.record = rows, record
        self.cache: Any = None
        """The first cache that came; its states are `states`."""
        self.states: list[Tensor] = []  # [rows, ...] each
        self.output: Any = None  # of the model, with logits [rows, 1, V] that the graph writes
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor, name: str, cache: Any) -> Any:
        """ids [B, 1] and a cache, which the model's forward knows by this name -> the model's kind
        of output, with logits [B, 1, V] and the cache to go on with.

        The next call overwrites both.
        """
        if self.cache is None:
            self._make(ids, name, cache)
        self._take_states(cache)
        self.ids[: len(ids)].copy_(ids)
        if self.graph is not None:
            self.graph.replay()
        elif not self.record or self.failure is not None:
            self.output = self._run()
        elif self.output is None:
            self.output = self._run_aside()
        else:
            self._record()
        logits = self.output.logits[: len(ids)]
        return type(self.output)(logits=logits, **{name: self.cache})

    def _make(self, ids: Tensor, name: str, cache: Any) -> None:
        self.name, self.cache = name, cache
        cache.states_stay = True  # modules may write into its states
        self.ids = ids.new_zeros(self.rows, 1)
        given = [container[key] for container, key in self.find_places(cache)]
        self.states = [x if len(x) == self.rows else widen(x, self.rows) for x in given]

    def _run(self) -> Any:
        """The step itself: what a graph holds."""
        output = self.forward(
            input_ids=self.ids, use_cache=True, return_dict=True, **{self.name: self.cache}
        )
        self._take_states(self.cache)  # for modules that made new tensors
        return output

    def _take_states(self, cache: Any) -> None:
        """Copies the states of `cache` [B, ...] into the first rows of ours, unless they are ours;
        our cache then has ours."""
        given = [container[key] for container, key in self.find_places(cache)]
        pairs = zip(self.states, given, strict=True)
        if moved := [(ours, theirs) for ours, theirs in pairs if theirs is not ours]:
            torch._foreach_copy_(
                [ours[: len(theirs)] for ours, theirs in moved], [theirs for _, theirs in moved]
            )
            self._hold_states()

    def _hold_states(self) -> None:
        places = self.find_places(self.cache)
        for state, (container, key) in zip(self.states, places, strict=True):
            container[key] = state

    def _run_aside(self) -> Any:
        """On the stream that records, so that libraries have what they keep for each stream."""
        device = self.ids.device
        aside, current = recording_stream(device), torch.cuda.current_stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            output = self._run()
        current.wait_stream(aside)
        return output

    def _record(self) -> None:
        """Records the step and replays it; where it cannot be recorded, runs it.

        Inside autocast, casts of weights are found in its cache since the first token, and stay
        there until the surrounding autocast ends, after the last replay.
        """
        device = self.ids.device
        try:
            stream = recording_stream(device)
            with record(device, random=False, stream=stream) as graph:  # who draws is outside
                self.output = self._run()
        except NotRecorded as error:
            self.failure = str(error)
            self._hold_states()  # nothing has run
            self.output = self._run()
            return
        self.graph = graph
        graph.replay()


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def has_states(places: Iterable[Place]) -> bool:
    """Whether a prompt has filled the cache."""
    states = [container[key] for container, key in places]
    return bool(states) and all(state is not None for state in states)


def widen(state: Tensor, rows: int) -> Tensor:
    """Zeros [rows, ...] whose rows lie in memory as those of state [B, ...] do."""
    row = torch.empty_like(state[0])
    strides = (row.numel(), *row.stride())
    return torch.empty_strided(
        (rows, *row.shape), strides, dtype=row.dtype, device=row.device
    ).zero_()
