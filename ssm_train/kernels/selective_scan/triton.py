"""Selective scan in Triton: segments of documents side by side, states passed between them.

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
CHUNKS = (16, 128)  # steps of a segment at most: least and most
OFFSETS = tl.constexpr(128)  # of documents, that a program looks at together
PROGRAMS = 2048  # that fill a GPU; fewer, and segments get shorter
# Backwards:
GROUP = 2  # steps whose states are in registers at a time
REGISTERS = 168  # of a thread: more, and too few programs fit to hide their waiting; fewer spill


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
    assert cu_seqlens is None or len(u) == 1, u.shape
    count = len(u) if cu_seqlens is None else cu_seqlens.numel() - 1
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
        cu_seqlens,
        count if output_final_state else 0,
        dt_softplus,
    )
    return y, final.mT if output_final_state else None


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
    offsets: Any  # [documents + 1] for B = 1; None: each row is a document
    documents: int
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
        offsets: Tensor | None,
    ) -> Inputs:
        rows, length, channels = u.shape
        return cls(
            u, u.stride(1), dt, dt.stride(1), A,
            B, B.stride(1), None if B.ndim == 3 else channels,
            C, C.stride(1), None if C.ndim == 3 else channels,
            z, 0 if z is None else z.stride(1), D, initial,
            offsets, rows if offsets is None else len(offsets) - 1,
            length, channels, len(A),
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
        offsets: Tensor | None,
        final_states: int,
        dt_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs.of(u, dt, A, B, C, D, z, initial, offsets)
        rows, length, channels = u.shape
        blocks, states = triton.cdiv(channels, CHANNELS), triton.next_power_of_2(len(A))
        chunk = choose_chunk(rows * length, blocks)
        sizes = {
            "CHUNK": chunk, "SOFTPLUS": dt_softplus, "STATES": states, "CHANNELS": CHANNELS,
            "FULL": channels % CHANNELS == 0 and states == len(A), "num_warps": 1,
        }  # fmt: skip
        grid = blocks, count_segments(inputs, chunk)
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        final = A.new_empty((final_states, *A.shape))
        # The state before step t of all rows is number t // CHUNK, if t begins a segment and no
        # document. Two such steps are at least CHUNK apart, in two documents too.
        entering = A.new_empty((triton.cdiv(rows * length, chunk), *A.shape))
        durations = A.new_zeros((triton.cdiv(rows * length, chunk), channels))
        if length > chunk:
            _sum_segments[grid](inputs, entering, durations, **sizes)
            _pass_states[grid](inputs, entering, durations, AHEAD=4, REVERSE=False, **sizes)
        _outputs[grid](inputs, entering, y, final if final_states else None, **sizes)
        ctx.save_for_backward(u, dt, A, B, C, D, z, initial, offsets, entering, durations)
        ctx.grid, ctx.sizes, ctx.has_final = grid, sizes, final_states > 0
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, entering, durations = ctx.saved_tensors
        inputs, (blocks, segments), sizes = Inputs.of(*tensors), ctx.grid, ctx.sizes
        u, dt, A, B, C, D, z, initial, _ = tensors
        outer = grad_y.contiguous(), grad_final.contiguous() if ctx.has_final else None
        adjoints = A.new_empty((len(durations), *A.shape))
        if inputs.length > sizes["CHUNK"]:
            _sum_segments_back[ctx.grid](inputs, *outer, adjoints, **sizes)
            _pass_states[ctx.grid](inputs, adjoints, durations, AHEAD=4, REVERSE=True, **sizes)
        # Each program has memory for the states before the groups of a segment. It takes one
        # segment after the other, the next that none has taken.
        programs = min(segments, triton.cdiv(PROGRAMS, blocks))
        taken = torch.zeros(blocks, dtype=torch.int32, device=u.device)
        groups = A.new_empty((programs, sizes["CHUNK"] // GROUP, *A.shape))
        grad_u, grad_dt, grad_z = (
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (u, dt, z)
        )
        # What many programs have a share of is summed at the end, in an order that is always one.
        grad_A, grad_D = (
            A.new_empty((segments, *x.shape)) if ctx.needs_input_grad[k] else None
            for k, x in ((2, A), (5, D))
        )
        grad_B, grad_C = (
            A.new_empty((blocks, *x.shape) if x.ndim == 3 else x.shape) for x in (B, C)
        )
        grad_initial = None if initial is None else torch.empty_like(initial)
        _gradients[blocks, programs](
            inputs, *outer, entering, adjoints, groups, taken, segments,
            grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial,
            GROUP=GROUP, maxnreg=REGISTERS, **sizes,
        )  # fmt: skip
        grad_B, grad_C = (
            (grad.sum(0) if x.ndim == 3 else grad).to(x.dtype)
            for grad, x in ((grad_B, B), (grad_C, C))
        )
        grad_A, grad_D = (None if g is None else g.sum(0) for g in (grad_A, grad_D))
        return (grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial) + (None,) * 4


def choose_chunk(steps: int, blocks: int) -> int:
    """The most steps of a segment, for so many of all rows and blocks of channels."""
    chunk = CHUNKS[1]
    while chunk > CHUNKS[0] and blocks * triton.cdiv(steps, chunk) < PROGRAMS:
        chunk //= 2
    return chunk


def count_segments(i: Inputs, chunk: int) -> int:
    """The places of `_segment`, whatever the lengths of the documents are."""
    if i.offsets is None:
        return i.documents * triton.cdiv(i.length, chunk)
    return i.length // chunk + i.documents


# ---------------------------------------------------------------- kernels
#
# A program has some channels of a segment, which is some steps of one document, and takes one step
# after the other, [N, D] at a time: states (a power of two; those too many have A = B = C = 0) and
# channels. `t` is a step, counted over all rows. A mask takes a scalar condition as a bound, for
# which Triton's interpreter has the right type.


@triton.jit
def _only_if(condition, bound):
    """A bound that nothing is below unless the scalar condition holds."""
    return tl.where(condition, bound, 0)


COMPILED = tl.constexpr(isinstance(_only_if, triton.runtime.JITFunction))  # not interpreted


@triton.jit
def _exp2(x):
    """To 2 units in the last place, and 0 in place of a subnormal number. tl.exp2 scales before
    and after for those: five instructions in place of one."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + _exp2(x * -1.4426950408889634))


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), by log(1 + e) = 2 artanh(e / (2 + e))."""
    e = _exp2(tl.abs(x) * -1.4426950408889634)
    s = e / (2 + e)  # in [0, 1/3]
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def _place(i, N: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    """States [N] and channels [D] of this program, the places of its states [N, D] in [n, d];
    masks of all three, which vanish from the code if it is FULL; and A in units of log 2."""
    n = tl.arange(0, N)
    d = tl.program_id(0) * D + tl.arange(0, D)
    place = n[:, None] * i.channels + d[None, :]
    if FULL:
        has_n = tl.full([N], True, tl.int1)
        has_d = tl.full([D], True, tl.int1)
    else:
        has_n = n < i.states
        has_d = d < i.channels
    has = has_n[:, None] & has_d[None, :]
    return n, d, place, has_n, has_d, has, _load(i.A + place, has) * 1.4426950408889634


@triton.jit
def _segment(i, place, CHUNK: tl.constexpr):
    """A segment's first step; the steps from there to its document's end; its document; and
    whether it begins it.

    `place` counts segments. Documents with offsets o are cut every CHUNK steps, and document i has
    the places from o[i] // CHUNK + i to the next document's: enough, and at most one too many, from
    which no steps are left. A document without tokens has one segment. All is found by reductions,
    whose results the compiler knows to be those of the whole program.
    """
    if i.offsets is None:
        pieces = tl.cdiv(i.length, CHUNK)
        document = place // pieces
        begin = document * i.length
        end = begin + i.length
        piece = place % pieces
    else:
        document, begin, end = -1, 0, i.length
        for k in range(0, i.documents, OFFSETS):
            number = k + tl.arange(0, OFFSETS)
            exists = number < i.documents
            offsets = tl.load(i.offsets + number, mask=exists, other=0).to(tl.int32)
            before = exists & (offsets // CHUNK + number <= place)
            document += tl.sum(before.to(tl.int32), 0)
            begin = tl.maximum(begin, tl.max(tl.where(before, offsets, 0), 0))
            end = tl.minimum(end, tl.min(tl.where(exists & (before == 0), offsets, i.length), 0))
        piece = place - (begin // CHUNK + document)
    first = begin + piece * CHUNK
    return first, end - first, document.to(tl.int64), piece == 0


@triton.jit
def _load(at, mask):
    """0 outside the mask."""
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _row(x, stride, first, step):
    """The row of a step of a segment. Only the way to the segment's first row may be long."""
    return x + first.to(tl.int64) * stride + step * stride


@triton.jit
def _load_matrix(x, stride, own, first, step, n, d, has_n, has):
    """A step of B or C, as stored: [N, 1], or [N, D] where each channel has its own."""
    row = _row(x, stride, first, step)
    if own is None:
        return _load(row + n, has_n)[:, None]
    else:
        return _load(row + (n[:, None] * own + d[None, :]), has)


@triton.jit
def _load_inputs(i, first, step, n, d, has_n, has_d, has):
    """dt, u and B of a step, as stored."""
    return (
        _load(_row(i.dt, i.dt_stride, first, step) + d, has_d),
        _load(_row(i.u, i.u_stride, first, step) + d, has_d),
        _load_matrix(i.B, i.B_stride, i.B_channels, first, step, n, d, has_n, has),
    )


@triton.jit
def _load_outputs(i, grad_y, first, step, n, d, has_n, has_d, has):
    """C, the gradient of y, and z (or something instead), as stored."""
    C = _load_matrix(i.C, i.C_stride, i.C_channels, first, step, n, d, has_n, has)
    gated = _load(_row(grad_y, i.channels, first, step) + d, has_d)
    if i.z is None:
        return C, gated, gated
    else:
        return C, gated, _load(_row(i.z, i.z_stride, first, step) + d, has_d)


@triton.jit
def _ungate(i, gated, z):
    """The gradient [D] of the output before the gate."""
    if i.z is None:
        return gated.to(tl.float32)
    else:
        z = z.to(tl.float32)
        return gated.to(tl.float32) * z * _sigmoid(z)


@triton.jit
def _step_size(stored, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        return _softplus(stored.to(tl.float32))
    else:
        return stored.to(tl.float32)


@triton.jit
def _advance(a, state, dt, u, B):
    """h_t [N, D] after `state`."""
    return _exp2(dt[None, :] * a) * state + (dt * u)[None, :] * B.to(tl.float32)


@triton.jit
def _state_before(i, entering, first, begins, document, place, has, CHUNK: tl.constexpr):
    """[N, D], the state before the first step of a segment."""
    state = tl.zeros(place.shape, tl.float32)
    if begins:
        if i.initial is not None:
            state = _load(i.initial + document * i.states * i.channels + place, has)
    else:
        at = entering + (first // CHUNK).to(tl.int64) * i.states * i.channels + place
        state = _load(at, has)
    return state


@triton.jit
def _sum_segments(
    i, entering, durations,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """For each segment that another continues: what it makes of a state of 0, or of its document's
    initial state, in place of the state that enters the other; and the sum of its dt."""
    first, left, document, begins = _segment(i, tl.program_id(1), CHUNK)
    if left <= CHUNK:
        return
    n, d, place, has_n, has_d, has, a = _place(i, STATES, CHANNELS, FULL)
    state = tl.zeros([STATES, CHANNELS], tl.float32)
    if begins:
        state = _state_before(i, entering, first, begins, document, place, has, CHUNK)
    duration = tl.zeros([CHANNELS], tl.float32)
    stored, u, B = _load_inputs(i, first, 0, n, d, has_n, has_d, has)
    for step in range(CHUNK):
        later = _load_inputs(i, first, step + 1, n, d, has_n, has_d, has)
        dt = _step_size(stored, SOFTPLUS)
        state = _advance(a, state, dt, u.to(tl.float32), B)
        duration += dt
        stored, u, B = later
    at = (first // CHUNK + 1).to(tl.int64) * i.states * i.channels + place
    tl.store(entering + at, state, mask=has)
    tl.store(durations + first // CHUNK * i.channels + d, duration, mask=has_d)


@triton.jit
def _pass_states(
    i, states, durations,
    AHEAD: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """From the first or the last segment of a document, adds to each share of a state or adjoint
    the one before it, after or before a segment's decay."""
    first, left, _, begins = _segment(i, tl.program_id(1), CHUNK)
    if not begins:
        return
    n, d, place, _, _, _, a = _place(i, STATES, CHANNELS, FULL)
    segments = tl.cdiv(left, CHUNK)
    state = tl.zeros([STATES, CHANNELS], tl.float32)
    for begin in range(1, segments, AHEAD):
        loaded = ()
        for k in tl.static_range(AHEAD):
            exists = begin + k < segments
            t = first + CHUNK * (segments - begin - k if REVERSE else begin + k)
            at = states + (t // CHUNK).to(tl.int64) * i.states * i.channels + place
            has_d = d < _only_if(exists, i.channels)
            has = (n < i.states)[:, None] & has_d[None, :]
            over = durations + (t // CHUNK - (0 if REVERSE else 1)) * i.channels + d
            loaded += ((at, has, _load(at, has), _load(over, has_d)),)
        for k in tl.static_range(AHEAD):
            state = _exp2(loaded[k][3][None, :] * a) * state + loaded[k][2]
            tl.store(loaded[k][0], state, mask=loaded[k][1])


@triton.jit
def _outputs(
    i, entering, y, final,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y, and the states after documents."""
    first, left, document, begins = _segment(i, tl.program_id(1), CHUNK)
    if (left <= 0) & (begins == 0):
        return
    n, d, place, has_n, has_d, has, a = _place(i, STATES, CHANNELS, FULL)
    state = _state_before(i, entering, first, begins, document, place, has, CHUNK)
    D = tl.zeros([CHANNELS], tl.float32)
    if i.D is not None:
        D = _load(i.D + d, has_d)
    steps = tl.minimum(left, CHUNK)
    # For a document without tokens the row before, if there is one: nothing is made of it.
    begin = tl.where(steps > 0, 0, -tl.minimum(first, 1))
    stored, u, B = _load_inputs(i, first, begin, n, d, has_n, has_d, has)
    for step in range(steps):
        later = _load_inputs(i, first, tl.minimum(step + 1, steps - 1), n, d, has_n, has_d, has)
        C = _load_matrix(i.C, i.C_stride, i.C_channels, first, step, n, d, has_n, has)
        u = u.to(tl.float32)
        state = _advance(a, state, _step_size(stored, SOFTPLUS), u, B)
        output = tl.sum(state * C.to(tl.float32), 0) + D * u
        if i.z is not None:
            z = _load(_row(i.z, i.z_stride, first, step) + d, has_d).to(tl.float32)
            output *= z * _sigmoid(z)
        tl.store(_row(y, i.channels, first, step) + d, output, mask=has_d)
        stored, u, B = later
    if final is not None:
        if left <= CHUNK:
            tl.store(final + document * i.states * i.channels + place, state, mask=has)


@triton.jit
def _adjoint_after(i, grad_final, adjoints, first, left, document, place, has, CHUNK: tl.constexpr):
    """[N, D], the gradient of a segment's last state from what follows."""
    adjoint = tl.zeros(place.shape, tl.float32)
    if left > CHUNK:
        if adjoints is not None:
            at = adjoints + (first // CHUNK + 1).to(tl.int64) * i.states * i.channels + place
            adjoint = _load(at, has)
    else:
        if grad_final is not None:
            adjoint = _load(grad_final + document * i.states * i.channels + place, has)
    return adjoint


@triton.jit
def _sum_segments_back(
    i, grad_y, grad_final, adjoints,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What each segment that does not begin its document adds to the adjoint of the state that
    enters it."""
    first, left, document, begins = _segment(i, tl.program_id(1), CHUNK)
    if begins | (left <= 0):
        return
    n, d, place, has_n, has_d, has, a = _place(i, STATES, CHANNELS, FULL)
    adjoint = _adjoint_after(i, grad_final, None, first, left, document, place, has, CHUNK)
    steps = tl.minimum(left, CHUNK)
    step = steps - 1
    stored = _load(_row(i.dt, i.dt_stride, first, step) + d, has_d)
    C, gated, z = _load_outputs(i, grad_y, first, step, n, d, has_n, has_d, has)
    for _ in range(steps):
        step = tl.maximum(step - 1, 0)
        later = _load_outputs(i, grad_y, first, step, n, d, has_n, has_d, has)
        stored_later = _load(_row(i.dt, i.dt_stride, first, step) + d, has_d)
        adjoint += _ungate(i, gated, z)[None, :] * C.to(tl.float32)
        adjoint *= _exp2(_step_size(stored, SOFTPLUS)[None, :] * a)
        C, gated, z = later
        stored = stored_later
    tl.store(
        adjoints + (first // CHUNK).to(tl.int64) * i.states * i.channels + place, adjoint, mask=has
    )


@triton.jit
def _take(taken):
    """The number of a segment that no program for these channels has had. A reduction, as in
    `_segment`, over one lane that counts."""
    lane = tl.arange(0, 32)
    numbers = tl.atomic_add(taken + tl.program_id(0) + 0 * lane, 1, mask=lane == 0, sem="relaxed")
    return tl.max(tl.where(lane == 0, numbers, 0), 0)


@triton.jit
def _gradients(
    i, grad_y, grad_final, entering, adjoints, groups, taken, segments,
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    n, d, place, has_n, has_d, has, a = _place(i, STATES, CHANNELS, FULL)
    size = i.states * i.channels
    D = tl.zeros([CHANNELS], tl.float32)
    if i.D is not None:
        D = _load(i.D + d, has_d)
    groups += tl.program_id(1).to(tl.int64) * (CHUNK // GROUP) * size + place
    number = _take(taken)
    while number < segments:
        first, left, document, begins = _segment(i, number, CHUNK)
        steps = tl.maximum(tl.minimum(left, CHUNK), 0)
        # The gradient of the state after a step, from what follows that step.
        passed = _adjoint_after(i, grad_final, adjoints, first, left, document, place, has, CHUNK)
        sum_A = tl.zeros([STATES, CHANNELS], tl.float32)
        sum_D = tl.zeros([CHANNELS], tl.float32)

        # Forwards, for the state that enters each group.
        alone = begins | (left <= 0)
        state = _state_before(i, entering, first, alone, document, place, has, CHUNK)
        count = tl.cdiv(steps, GROUP)
        tl.store(groups, state, mask=has)
        for group in range(1, count):
            for k in tl.static_range(GROUP):
                step = (group - 1) * GROUP + k
                stored, u, B = _load_inputs(i, first, step, n, d, has_n, has_d, has)
                state = _advance(a, state, _step_size(stored, SOFTPLUS), u.to(tl.float32), B)
            tl.store(groups + group * size, state, mask=has)
        tl.debug_barrier()

        for later_groups in range(count):
            group = count - 1 - later_groups
            step = group * GROUP
            state = _load(groups + group * size, has)
            after = (state,)  # the group's states, and what it continues
            rows = ()
            for k in tl.static_range(GROUP):
                at = tl.minimum(step + k, steps - 1)
                exists = d < _only_if(step + k < steps, i.channels)  # a step behind the end: 0
                stored, u, B = _load_inputs(i, first, at, n, d, has_n, has_d, has)
                C, gated, z = _load_outputs(i, grad_y, first, at, n, d, has_n, has_d, has)
                u = u.to(tl.float32)
                dt = tl.where(exists, _step_size(stored, SOFTPLUS), 0.0)
                gated = tl.where(exists, gated.to(tl.float32), 0.0)
                rows += ((stored, u, B.to(tl.float32), C.to(tl.float32), dt, gated, z, exists),)
            for k in tl.static_range(GROUP):
                _, u, B, _, dt, _, _, _ = rows[k]
                state = _advance(a, state, dt, u, B)
                after += (state,)
            for k in tl.static_range(GROUP - 1, -1, -1):
                stored, u, B, C, dt, gated, z, exists = rows[k]
                ungated = _ungate(i, gated, z)
                if i.z is not None:
                    output = tl.sum(after[k + 1] * C, 0) + D * u
                    z = z.to(tl.float32)
                    s = _sigmoid(z)
                    tl.store(
                        _row(grad_z, i.channels, first, step + k) + d,
                        gated * output * s * (1 + z * (1 - s)),
                        mask=exists,
                    )
                has_step = n < _only_if(step + k < steps, i.states)
                by_C = after[k + 1] * ungated[None, :]
                _store_matrix(grad_C, i.C_channels, by_C, first, step + k, n, d, has_step, i)
                adjoint = ungated[None, :] * C + passed
                by_B = adjoint * (dt * u)[None, :]
                _store_matrix(grad_B, i.B_channels, by_B, first, step + k, n, d, has_step, i)
                by_input = tl.sum(adjoint * B, 0)
                tl.store(
                    _row(grad_u, i.channels, first, step + k) + d,
                    dt * by_input + ungated * D,
                    mask=exists,
                )
                passed = _exp2(dt[None, :] * a) * adjoint
                by_exponent = passed * after[k]
                if grad_A is not None:
                    sum_A += by_exponent * dt[None, :]
                by_step = u * by_input + tl.sum(by_exponent * a, 0) * 0.6931471805599453
                if SOFTPLUS:
                    by_step *= _sigmoid(stored.to(tl.float32))
                tl.store(_row(grad_dt, i.channels, first, step + k) + d, by_step, mask=exists)
                if grad_D is not None:
                    sum_D += ungated * u
        tl.debug_barrier()
        if grad_A is not None:
            tl.store(grad_A + number.to(tl.int64) * size + place, sum_A, mask=has)
        if grad_D is not None:
            tl.store(grad_D + number * i.channels + d, sum_D, mask=has_d)
        if i.initial is not None:
            if begins:
                tl.store(grad_initial + document * size + place, passed, mask=has)
        number = _take(taken)


@triton.jit
def _store_matrix(grad, own, by_channel, first, step, n, d, has_n, i):
    """The gradient [N, D] of a step of B or C: of a shared one, the sum over these channels."""
    if own is None:
        rows = i.documents if i.offsets is None else 1
        grad += tl.program_id(0).to(tl.int64) * rows * i.length * i.states
        tl.store(_row(grad, i.states, first, step) + n, tl.sum(by_channel, 1), mask=has_n)
    else:
        at = _row(grad, i.states * own, first, step) + (n[:, None] * own + d[None, :])
        tl.store(at, by_channel, mask=has_n[:, None] & (d < own)[None, :])
