"""Selective scan in Triton: chunks of time side by side, states passed between them.

Nothing is tuned at run time: a first step waits for one compilation of each kernel. Constants are
the best that were seen on an H100.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_train.kernels.rows import by_rows

CHANNELS = 32  # of a program. It is one warp, so that no sum over states waits for another
CHUNKS = (16, 128)  # steps of a program, least and most; a state is kept for each chunk
PROGRAMS = 2048  # that fill a GPU; fewer, and chunks get shorter
# Backwards:
GROUP = 2  # steps whose states are in registers at a time
REGISTERS = 128  # of a thread; more, and too few programs fit a multiprocessor to hide its waiting


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.selective_scan`; everything is computed in fp32."""
    count = len(u) if cu_seqlens is None else cu_seqlens.numel() - 1
    starting, ending = (None, None) if cu_seqlens is None else mark_documents(cu_seqlens, u.shape)
    if initial_state is not None:
        initial_state = initial_state.float().mT.expand(count, -1, -1).contiguous()
    y, final = _Scan.apply(
        by_rows(u),
        by_rows(dt),
        A.float().mT.contiguous(),
        by_rows(B if B.ndim == 3 else B.mT),
        by_rows(C if C.ndim == 3 else C.mT),
        None if D is None else D.float(),
        None if z is None else by_rows(z),
        initial_state,
        starting,
        ending,
        count if output_final_state else 0,
        dt_softplus,
    )
    if not output_final_state:
        return y, None
    if cu_seqlens is not None:  # a document without tokens ends where it starts
        start = 0.0 if initial_state is None else initial_state
        final = torch.where(cu_seqlens.diff()[:, None, None] == 0, start, final)
    return y, final.mT


def mark_documents(cu_seqlens: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """For each step of one row [T] int32: the document that starts there, and that ends there,
    or -1."""
    assert shape[0] == 1, shape
    steps = torch.arange(-1, shape[1] + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    documents = torch.searchsorted(cu_seqlens, steps, right=True, out_int32=True) - 1
    changes = documents[1:] != documents[:-1]
    inner = documents[1:-1]
    return torch.where(changes[:-1], inner, -1), torch.where(changes[1:], inner, -1)


class Inputs(NamedTuple):
    """What all kernels read. A stride leads from a step to the next, over all batches."""

    u: Any  # [B, T, d]
    u_stride: int
    dt: Any  # [B, T, d]
    dt_stride: int
    A: Any  # [n, d] fp32
    B: Any  # [B, T, n], or [B, T, n, d]
    B_stride: int
    B_channels: int | None  # None: B is shared by all
    C: Any
    C_stride: int
    C_channels: int | None
    z: Any  # [B, T, d] or None
    z_stride: int
    D: Any  # [d] fp32 or None
    initial: Any  # [documents, n, d] fp32 or None
    starting: Any  # [T] int32 for B = 1, see `mark_documents`; None: each row is a document
    ending: Any
    length: int
    channels: int
    states: int

    @classmethod
    def of(
        cls,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial: Tensor | None,
        starting: Tensor | None,
        ending: Tensor | None,
    ) -> Inputs:
        channels = u.shape[2]
        return cls(
            u, u.stride(1), dt, dt.stride(1), A,
            B, B.stride(1), None if B.ndim == 3 else channels,
            C, C.stride(1), None if C.ndim == 3 else channels,
            z, 0 if z is None else z.stride(1), D, initial, starting, ending,
            u.shape[1], channels, len(A),
        )  # fmt: skip


class _Scan(torch.autograd.Function):
    """Tensors as in `Inputs` -> y [B, T, d], final [documents, n, d] (none of them: empty)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial: Tensor | None,
        starting: Tensor | None,
        ending: Tensor | None,
        final_states: int,
        dt_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs.of(u, dt, A, B, C, D, z, initial, starting, ending)
        blocks = triton.cdiv(u.shape[2], CHANNELS)
        chunk = choose_chunk(u.shape[1], blocks * len(u))
        grid = blocks, triton.cdiv(u.shape[1], chunk), len(u)
        sizes = {
            "CHUNK": chunk, "SOFTPLUS": dt_softplus,
            "STATES": triton.next_power_of_2(len(A)), "CHANNELS": CHANNELS, "num_warps": 1,
        }  # fmt: skip
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        final = A.new_empty((final_states, *A.shape))
        entering = decays = None  # [B, chunks, n, d]
        if grid[1] > 1:
            entering, decays = A.new_empty((2, len(u), grid[1], *A.shape))
            _sum_chunks[grid](inputs, entering, decays, **sizes)
            pass_states(entering, decays, reverse=False)
        _outputs[grid](inputs, entering, y, final if final_states else None, **sizes)
        ctx.save_for_backward(u, dt, A, B, C, D, z, initial, starting, ending, entering, decays)
        ctx.grid, ctx.sizes, ctx.has_final = grid, sizes, final_states > 0
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, entering, decays = ctx.saved_tensors
        inputs, grid, sizes = Inputs.of(*tensors), ctx.grid, ctx.sizes
        u, dt, A, B, C, D, z, initial, _, _ = tensors
        blocks, chunks, batch = grid
        outer = grad_y.contiguous(), grad_final.contiguous() if ctx.has_final else None
        adjoints = None
        if chunks > 1:
            adjoints = torch.empty_like(entering)
            _sum_chunks_back[grid](inputs, *outer, adjoints, **sizes)
            pass_states(adjoints, decays, reverse=True)
        # Each program has memory for the state before each group of its chunk, and goes on with
        # another chunk in the same memory.
        at_once = min(chunks, triton.cdiv(PROGRAMS, blocks * batch))
        groups = A.new_empty((batch, at_once, sizes["CHUNK"] // GROUP, *A.shape))
        grad_u, grad_dt, grad_z = (
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (u, dt, z)
        )
        # What many programs have a share of is summed at the end, in an order that is always one.
        grad_A = A.new_empty((batch, chunks, *A.shape))
        grad_B, grad_C = (
            A.new_empty((blocks, *x.shape) if x.ndim == 3 else x.shape) for x in (B, C)
        )
        grad_D = None if D is None else A.new_empty((batch, chunks, *D.shape))
        grad_initial = None if initial is None else torch.zeros_like(initial)
        _gradients[blocks, at_once, batch](
            inputs, *outer, entering, adjoints, groups, chunks,
            grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial,
            GROUP=GROUP, maxnreg=REGISTERS, **sizes,
        )  # fmt: skip
        grad_B, grad_C = (
            (grad.sum(0) if x.ndim == 3 else grad).to(x.dtype)
            for grad, x in ((grad_B, B), (grad_C, C))
        )
        grad_A, grad_D = (None if g is None else g.sum((0, 1)) for g in (grad_A, grad_D))
        return (grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial) + (None,) * 4


def choose_chunk(length: int, programs: int) -> int:
    """Steps of a chunk, where there are so many programs for each chunk."""
    chunk = CHUNKS[1]
    while chunk > CHUNKS[0] and programs * triton.cdiv(length, chunk) < PROGRAMS:
        chunk //= 2
    return chunk


def pass_states(states: Tensor, decays: Tensor, *, reverse: bool) -> None:
    """states, decays [B, chunks, n, d]: what each chunk makes of a state of 0, and its factor for
    any other. In place of the first: the state that enters each chunk."""
    batch, chunks, *shape = states.shape
    elements = shape[0] * shape[1]
    _pass_states[triton.cdiv(elements, 32), batch](
        states, decays, chunks, elements, BLOCK=32, AHEAD=8, REVERSE=reverse, num_warps=1
    )


# ---------------------------------------------------------------- kernels
#
# A program has some channels of a chunk of a row and takes one step after the other, [N, D] at a
# time: states (a power of two; those too many have A = B = C = 0) and channels. `t` is a step of
# the row, `row` the same counted over all batches. A mask takes a scalar condition as a bound, for
# which Triton's interpreter has the right type.


@triton.jit
def _only_if(condition, bound):
    """A bound that nothing is below unless the scalar condition holds."""
    return tl.where(condition, bound, 0)


@triton.jit
def _pass_states(
    states, decays, chunks, elements,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1).to(tl.int64) * chunks
    entering = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, AHEAD):
        places = ()
        added = ()
        factors = ()
        for k in tl.static_range(AHEAD):
            chunk = begin + (chunks - 1 - first - k if REVERSE else first + k)
            mask = element < _only_if((chunk >= begin) & (chunk < begin + chunks), elements)
            places += ((chunk * elements + element, mask),)
            added += (tl.load(states + chunk * elements + element, mask=mask, other=0.0),)
            factors += (tl.load(decays + chunk * elements + element, mask=mask, other=0.0),)
        for k in tl.static_range(AHEAD):
            tl.store(states + places[k][0], entering, mask=places[k][1])
            entering = tl.where(factors[k] == 0, 0.0, factors[k] * entering) + added[k]


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1 + e
    log1p = tl.where(w == 1, e, tl.log(w) * (e / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(x > 20, x, log1p)


@triton.jit
def _place(i, N: tl.constexpr, D: tl.constexpr):
    """States [N] and channels [D] of this program, the places of its states [N, D] in [n, d],
    which of them exist, and A in units of log 2."""
    n = tl.arange(0, N)
    d = tl.program_id(0) * D + tl.arange(0, D)
    place = n[:, None] * i.channels + d[None, :]
    exists = (n < i.states)[:, None] & (d < i.channels)[None, :]
    a = tl.load(i.A + place, mask=exists, other=0.0) * 1.4426950408889634
    return n, d, place, exists, a


@triton.jit
def _load_row(x, stride, t, d, i):
    """[D] fp32; 0 outside."""
    row = tl.program_id(2).to(tl.int64) * i.length + t
    mask = d < _only_if(t < i.length, i.channels)
    return tl.load(x + row * stride + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_matrix(x, stride, own, t, n, d, i):
    """A step of B or C: [N, 1], or [N, D] where each channel has its own."""
    at = x + (tl.program_id(2).to(tl.int64) * i.length + t) * stride
    mask = (n < _only_if(t < i.length, i.states))[:, None]
    if own is None:
        at = at + n[:, None]
    else:
        at = at + (n[:, None] * own + d[None, :])
        mask = mask & (d < i.channels)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _find_start(i, t):
    """The document that starts at step t, or -1."""
    if i.starting is None:
        return tl.where(t == 0, tl.program_id(2), -1).to(tl.int64)
    else:
        return tl.load(i.starting + t, mask=t < i.length, other=-1).to(tl.int64)


@triton.jit
def _find_end(i, t):
    if i.ending is None:
        return tl.where(t == i.length - 1, tl.program_id(2), -1).to(tl.int64)
    else:
        return tl.load(i.ending + t, mask=t < i.length, other=-1).to(tl.int64)


@triton.jit
def _initial(i, document, place, exists):
    """[N, D], the state that a document starts from."""
    if i.initial is None:
        return tl.zeros(place.shape, tl.float32)
    else:
        at = i.initial + document * i.states * i.channels + place
        return tl.load(at, mask=exists, other=0.0)


@triton.jit
def _load_inputs(i, t, n, d):
    """dt as stored, u and B of a step."""
    return (
        _load_row(i.dt, i.dt_stride, t, d, i),
        _load_row(i.u, i.u_stride, t, d, i),
        _load_matrix(i.B, i.B_stride, i.B_channels, t, n, d, i),
    )


@triton.jit
def _step_size(i, stored, t, d, SOFTPLUS: tl.constexpr):
    """dt [D]; 0 outside, where the state passes unchanged."""
    if SOFTPLUS:
        return tl.where(d < _only_if(t < i.length, i.channels), _softplus(stored), 0.0)
    else:
        return stored


@triton.jit
def _advance(i, a, t, d, place, exists, state, stored, u, B, SOFTPLUS: tl.constexpr):
    """h_t [N, D] after `state`, dt, and the document that starts here, or -1."""
    document = _find_start(i, t)
    if document >= 0:
        state = _initial(i, document, place, exists)
    dt = _step_size(i, stored, t, d, SOFTPLUS)
    return tl.exp2(dt[None, :] * a) * state + (dt * u)[None, :] * B, dt, document


@triton.jit
def _load_gradient(i, grad_y, t, d):
    """Gradients [D] of the output before and after the gate, and z."""
    gated = _load_row(grad_y, i.channels, t, d, i)
    if i.z is None:
        return gated, gated, gated
    else:
        z = _load_row(i.z, i.z_stride, t, d, i)
        return gated * z * _sigmoid(z), gated, z


@triton.jit
def _add_final(i, adjoint, grad_final, t, place, exists):
    """The adjoint of h_t [N, D] with what the final state of a document adds to it."""
    if grad_final is not None:
        document = _find_end(i, t)
        if document >= 0:
            at = grad_final + document * i.states * i.channels + place
            adjoint += tl.load(at, mask=exists, other=0.0)
    return adjoint


@triton.jit
def _chunk(i, index, chunks, CHUNK: tl.constexpr):
    """The number over all batches of a row's chunk, its first step and its steps."""
    first = index * CHUNK
    number = tl.program_id(2).to(tl.int64) * chunks + index
    return number, first, tl.minimum(CHUNK, i.length - first)


@triton.jit
def _sum_chunks(
    i, states, decays,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What each chunk makes of a state of 0, and its factor for any other."""
    n, d, place, exists, a = _place(i, STATES, CHANNELS)
    chunk, first, steps = _chunk(i, tl.program_id(1), tl.num_programs(1), CHUNK)
    state = tl.zeros([STATES, CHANNELS], tl.float32)
    duration = tl.zeros([CHANNELS], tl.float32)
    factor = 1.0
    stored, u, B = _load_inputs(i, first, n, d)
    for step in range(steps):
        t = first + step
        later = _load_inputs(i, t + 1, n, d)  # while this step is computed
        state, dt, document = _advance(i, a, t, d, place, exists, state, stored, u, B, SOFTPLUS)
        duration += dt
        factor = tl.where(document >= 0, 0.0, factor)
        stored, u, B = later
    at = chunk * i.states * i.channels + place
    tl.store(states + at, state, mask=exists)
    tl.store(decays + at, factor * tl.exp2(duration[None, :] * a), mask=exists)


@triton.jit
def _outputs(
    i, entering, y, final,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, d, place, exists, a = _place(i, STATES, CHANNELS)
    chunk, first, steps = _chunk(i, tl.program_id(1), tl.num_programs(1), CHUNK)
    size = i.states * i.channels
    state = tl.zeros([STATES, CHANNELS], tl.float32)
    if entering is not None:
        state = tl.load(entering + chunk * size + place, mask=exists, other=0.0)
    D = tl.zeros([CHANNELS], tl.float32)
    if i.D is not None:
        D = tl.load(i.D + d, mask=d < i.channels, other=0.0)
    stored, u, B = _load_inputs(i, first, n, d)
    for step in range(steps):
        t = first + step
        later = _load_inputs(i, t + 1, n, d)
        C = _load_matrix(i.C, i.C_stride, i.C_channels, t, n, d, i)
        state, _, _ = _advance(i, a, t, d, place, exists, state, stored, u, B, SOFTPLUS)
        output = tl.sum(state * C, 0) + D * u
        if i.z is not None:
            z = _load_row(i.z, i.z_stride, t, d, i)
            output *= z * _sigmoid(z)
        row = tl.program_id(2).to(tl.int64) * i.length + t
        tl.store(y + row * i.channels + d, output, mask=d < i.channels)
        if final is not None:
            document = _find_end(i, t)
            if document >= 0:
                tl.store(final + document * size + place, state, mask=exists)
        stored, u, B = later


@triton.jit
def _sum_chunks_back(
    i, grad_y, grad_final, adjoints,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the adjoint of the state that enters it."""
    n, d, place, exists, a = _place(i, STATES, CHANNELS)
    chunk, first, steps = _chunk(i, tl.program_id(1), tl.num_programs(1), CHUNK)
    passed = tl.zeros([STATES, CHANNELS], tl.float32)
    for step in range(steps):
        t = first + steps - 1 - step
        ungated, _, _ = _load_gradient(i, grad_y, t, d)
        C = _load_matrix(i.C, i.C_stride, i.C_channels, t, n, d, i)
        stored = _load_row(i.dt, i.dt_stride, t, d, i)
        adjoint = ungated[None, :] * C + passed
        adjoint = _add_final(i, adjoint, grad_final, t, place, exists)
        passed = tl.exp2(_step_size(i, stored, t, d, SOFTPLUS)[None, :] * a) * adjoint
        if _find_start(i, t) >= 0:
            passed = tl.zeros([STATES, CHANNELS], tl.float32)
    tl.store(adjoints + chunk * i.states * i.channels + place, passed, mask=exists)


@triton.jit
def _gradients(
    i, grad_y, grad_final, entering, adjoints, groups, chunks,
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, d, place, exists, a = _place(i, STATES, CHANNELS)
    size = i.states * i.channels
    D = tl.zeros([CHANNELS], tl.float32)
    if i.D is not None:
        D = tl.load(i.D + d, mask=d < i.channels, other=0.0)
    slot = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    groups += slot * (CHUNK // GROUP) * size + place
    for index in range(tl.program_id(1), chunks, tl.num_programs(1)):
        chunk, first, steps = _chunk(i, index, chunks, CHUNK)
        state = tl.zeros([STATES, CHANNELS], tl.float32)
        passed = state  # the adjoint of the state after this step, times the decay between the two
        if entering is not None:
            state = tl.load(entering + chunk * size + place, mask=exists, other=0.0)
            passed = tl.load(adjoints + chunk * size + place, mask=exists, other=0.0)

        # Forwards, for the state that enters each group.
        count = tl.cdiv(steps, GROUP)
        for group in range(count):
            tl.store(groups + group * size, state, mask=exists)
            for k in tl.static_range(GROUP):
                t = first + group * GROUP + k
                stored, u, B = _load_inputs(i, t, n, d)
                state, _, _ = _advance(i, a, t, d, place, exists, state, stored, u, B, SOFTPLUS)
        tl.debug_barrier()

        sum_A = tl.zeros([STATES, CHANNELS], tl.float32)
        sum_D = tl.zeros([CHANNELS], tl.float32)
        for back in range(count):
            group = count - 1 - back
            state = tl.load(groups + group * size, mask=exists, other=0.0)
            after = (state,)  # the group's states, and what it continues
            rows = ()
            for k in tl.static_range(GROUP):
                t = first + group * GROUP + k
                stored, u, B = _load_inputs(i, t, n, d)
                state, dt, document = _advance(
                    i, a, t, d, place, exists, state, stored, u, B, SOFTPLUS
                )
                after += (state,)
                rows += ((stored, u, B, dt, document),)
            for k in tl.static_range(GROUP):
                t = first + group * GROUP + (GROUP - 1 - k)
                inside = d < _only_if(t < i.length, i.channels)
                stored, u, B, dt, document = rows[GROUP - 1 - k]
                C = _load_matrix(i.C, i.C_stride, i.C_channels, t, n, d, i)
                ungated, gated, z = _load_gradient(i, grad_y, t, d)
                state = after[GROUP - k]
                previous = after[GROUP - 1 - k]
                if document >= 0:
                    previous = _initial(i, document, place, exists)

                row = tl.program_id(2).to(tl.int64) * i.length + t
                at = row * i.channels + d
                if i.z is not None:
                    output = tl.sum(state * C, 0) + D * u
                    s = _sigmoid(z)
                    tl.store(grad_z + at, gated * output * s * (1 + z * (1 - s)), mask=inside)
                _store_matrix(grad_C, i.C_channels, state * ungated[None, :], row, t, n, d, i)
                adjoint = ungated[None, :] * C + passed
                adjoint = _add_final(i, adjoint, grad_final, t, place, exists)
                _store_matrix(grad_B, i.B_channels, adjoint * (dt * u)[None, :], row, t, n, d, i)
                by_input = tl.sum(adjoint * B, 0)
                tl.store(grad_u + at, dt * by_input + ungated * D, mask=inside)
                passed = tl.exp2(dt[None, :] * a) * adjoint
                by_exponent = passed * previous
                sum_A += by_exponent * dt[None, :]
                by_step = u * by_input + tl.sum(by_exponent * a, 0) * 0.6931471805599453
                if SOFTPLUS:
                    by_step *= _sigmoid(stored)
                tl.store(grad_dt + at, by_step, mask=inside)
                sum_D += ungated * u
                if document >= 0:
                    if i.initial is not None:
                        tl.store(grad_initial + document * size + place, passed, mask=exists)
                    passed = tl.zeros([STATES, CHANNELS], tl.float32)
        tl.store(grad_A + chunk * size + place, sum_A, mask=exists)
        if i.D is not None:
            tl.store(grad_D + chunk * i.channels + d, sum_D, mask=d < i.channels)
        tl.debug_barrier()


@triton.jit
def _store_matrix(grad, own, by_channel, row, t, n, d, i):
    """The gradient [N, D] of a step of B or C: of a shared one, the sum over these channels."""
    mask = n < _only_if(t < i.length, i.states)
    if own is None:
        rows = tl.num_programs(2).to(tl.int64) * i.length
        at = grad + (tl.program_id(0) * rows + row) * i.states + n
        tl.store(at, tl.sum(by_channel, 1), mask=mask)
    else:
        at = grad + (row * i.states + n[:, None]) * own + d[None, :]
        tl.store(at, by_channel, mask=mask[:, None] & (d < own)[None, :])
