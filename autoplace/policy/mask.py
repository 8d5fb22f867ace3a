"""The hard mask: which devices the current class may go to. Kernels over `Tables` and `State`."""

from __future__ import annotations

from autoplace.jit import inline
from autoplace.policy.partial import CERTIFIED, MASKED, STEP, WORK, certified, repack

__all__ = ["fill_mask"]

REPACK_WORK = 20_000_000
"""Steps of → `repack` that one placement may spend on its look-ahead; then only the certificate counts."""


@inline
def _reaches(tables, state, current, device, ahead):
    """Whether every decided neighbour of the class can talk to the device; `ahead`: and each open one keeps a place."""
    for k in range(tables.class_offsets[current], tables.class_offsets[current + 1]):
        op = tables.class_members[k]
        for i in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
            source = state.device_of[tables.class_of[tables.tensor_producer[tables.in_tensors[i]]]]
            if source >= 0 and not tables.connected[source, device]:
                return False
        for i in range(tables.out_offsets[op], tables.out_offsets[op + 1]):
            tensor = tables.out_tensors[i]
            for j in range(tables.consumer_offsets[tensor], tables.consumer_offsets[tensor + 1]):
                consumer = tables.consumers[j]
                target = state.device_of[tables.class_of[consumer]]
                if target >= 0 and not tables.connected[device, target]:
                    return False
                if target < 0 and ahead and not _keeps_a_place(tables, state, consumer, device, current):
                    return False
    return True


@inline
def _keeps_a_place(tables, state, op, device, current):
    """Whether an undecided op can still go somewhere when the current class, which it reads, is on this device."""
    own = tables.class_of[op]
    if own == current:
        return True
    for place in range(state.load.shape[0]):
        fits = tables.can_run[own, place] and tables.connected[device, place]
        for i in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
            if not fits:
                break
            source = state.device_of[tables.class_of[tables.tensor_producer[tables.in_tensors[i]]]]
            fits = source < 0 or tables.connected[source, place]
        if fits:
            return True
    return False


@inline
def fill_mask(tables, state, mask):
    """Fill the hard mask of the current class and say whether any device is allowed.

    A device is allowed when the class (1) can run there, (2) can talk to its decided neighbours, (3) fits into the
    memory left, (4) leaves every undecided consumer a device that reaches its decided producers, and (5) leaves a
    packing of all undecided classes into memory. For (5) a packing is carried along and repaired by largest-first
    packing; where none is known, (5) is not asked. When no device satisfies all five, (4) and then (5) are dropped;
    when none satisfies (1) to (3), the mask is all false and the placement has failed. Where the state's masks are not
    hard, only (1) is asked.

    Args:
        tables, state: The problem and the placement.
        mask: bool[D], filled.
    """
    current = int(state.numbers[STEP])
    devices = mask.shape[0]
    if state.numbers[MASKED] == 0.0:
        found = False
        for d in range(devices):
            mask[d] = tables.can_run[current, d]
            found = found or mask[d]
        return found
    for lenient in range(4):
        ahead = lenient in (0, 2) and not tables.flags[3]
        packing = lenient < 2 and tables.flags[4] and state.numbers[CERTIFIED] > 0.0
        if (lenient in (1, 3) and tables.flags[3]) or (lenient >= 2 and not tables.flags[4]):
            continue
        found = False
        for d in range(devices):
            mask[d] = tables.can_run[current, d] and tables.need[current] <= state.left[d]
            if mask[d] and not tables.flags[3]:
                mask[d] = _reaches(tables, state, current, d, ahead)
            if mask[d] and packing and not certified(tables, state, current, d):
                state.numbers[WORK] += tables.need.shape[0]
                mask[d] = state.numbers[WORK] < REPACK_WORK and repack(tables, state, current, d, False)
            found = found or mask[d]
        if found:
            return True
    return False
