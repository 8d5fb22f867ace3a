"""The columns of the features: names, meaning, order. Belongs to `FEATURE_VERSION`: change one, raise it.

Columns that differ by device come first, then those that are the same in every row. In both parts those that change
from decision to decision come first; the others are a problem's own and enter a rollout through a cache.

"Gap" is the distance to the best allowed device, "push" the distance beyond the present value, both in units of the
class's mean latency and squeezed by slog(x) = sign(x) log(1 + |x|). "Mean over 2 hops on" is that of the ops two
hand-overs ahead, every way taken with equal weight; "back" are those behind. Features propagated over the graph without
learned weights are those of SIGN (Frasca et al. 2020, "SIGN: Scalable Inception Graph Neural Networks"); sums along all
ways ahead, each hop counting less by the factor 0.9 (near) or 0.99 (far), replace its higher powers.
"""

from __future__ import annotations

__all__ = [
    "CLASS_OWN", "CLASS_SPREAD", "FEATURES", "FEATURE_LIMIT", "FEATURE_VERSION", "MESSAGE_COLUMNS", "NUM_FEATURES",
    "NUM_PAIR", "NUM_PAIR_MOVING", "NUM_SHARED_MOVING", "PAIR_OWN", "PAIR_SPREAD", "WHOLE",
]  # fmt: skip

FEATURE_VERSION = 2
"""Policies are bound to it."""
FEATURE_LIMIT = 10.0
"""Every feature lies in [-10, 10]."""

PAIR_MOVING = (
    ("exists", "1 for a device, 0 for padding"),
    ("allowed", "1 where the mask allows the device"),
    ("start_gap", "earliest start, gap"),
    ("finish_gap", "earliest finish, gap"),
    ("finish_best", "1 where the finish is the earliest"),
    ("makespan_push", "finish beyond the makespan so far"),
    ("path_gap", "finish plus optimistic tail (PEFT), gap"),
    ("path_best", "1 where that is the least"),
    ("horizon_push", "finish plus optimistic tail beyond the horizon so far"),
    ("objective_gap", "guess at the final log J, gap in units of the class's share of the whole"),
    ("objective_best", "1 where that is the least"),
    ("transfer", "log(1 + incoming transfer time / mean latency)"),
    ("data_wait", "data ready less device free"),
    ("free_gap", "time at which the device is free, gap"),
    ("load_share", "load over the balanced load of the finished placement"),
    ("load_gap", "load after, gap"),
    ("load_push", "load after beyond the highest so far"),
    ("link_push", "highest incoming link load after beyond the highest so far"),
    ("rest_here", "log of load plus this and all later classes, all here, over the present guess at the whole time"),
    ("idle", "fraction of the time until the device is free in which it had nothing to do"),
    ("room", "highest of fluid time and present load, less the load after"),
    ("fluid_gap", "fluid time after, gap; fluid time: all later work poured over the devices as their loads allow"),
    ("demand", "log of load plus the later work that suits the device, over its mean"),
    ("sent_share", "transfer time out of the device over the balanced load"),
    ("producers_here", "fraction of the decided producers that are here"),
    ("bytes_here", "fraction of the incoming bytes that are here"),
    ("siblings_here", "fraction of the decided producers of the consumers that are here"),
    ("level_here", "fraction of the work at the class's depth that is here"),
    ("previous_here", "1 where the last class went"),
    ("recent_here", "fraction of the last decisions that are here, each counting 7/8 of the one after it"),
    ("memory_after", "fraction of memory left after; 1 when unlimited"),
    ("memory_need", "need of the class over memory left; 0 when unlimited"),
    ("memory_share", "slog of memory left after over a fair share of what is still needed, less 1; 5 when unlimited"),
)
(
    EXISTS, ALLOWED, START_GAP, FINISH_GAP, FINISH_BEST, MAKESPAN_PUSH, PATH_GAP, PATH_BEST, HORIZON_PUSH,
    OBJECTIVE_GAP, OBJECTIVE_BEST, TRANSFER, DATA_WAIT, FREE_GAP, LOAD_SHARE, LOAD_GAP, LOAD_PUSH, LINK_PUSH,
    REST_HERE, IDLE, ROOM, FLUID_GAP, DEMAND, SENT_SHARE, PRODUCERS_HERE, BYTES_HERE, SIBLINGS_HERE, LEVEL_HERE,
    PREVIOUS_HERE, RECENT_HERE, MEMORY_AFTER, MEMORY_NEED, MEMORY_SHARE,
) = range(len(PAIR_MOVING))  # fmt: skip

PAIR_OWN = (
    ("latency_log", "log of latency over the fastest device's, at most 5"),
    ("latency_mean", "latency over the mean, less 1"),
    ("slowness", "mean over all classes of latency_log, less the best device's"),
    ("energy_log", "log of energy above idle over the least device's; 0 when energy does not count"),
    ("speed_share", "log of the device's share of all devices' speed, times their number"),
    ("send_cost", "log(1 + mean time to send the output to another device / mean latency)"),
    ("tail_gap", "optimistic tail, gap over all devices"),
    ("next8_here", "share of the next 8 classes' work that suits the device, times the number of devices, less 1"),
    ("next64_here", "the same of the next 64"),
    ("rest_suits", "the same of all later classes"),
)
PAIR_SPREAD = (
    ("latency_on1", "latency_log, mean over 1 hop on"),
    ("latency_on2", "latency_log, mean over 2 hops on"),
    ("latency_on4", "latency_log, mean over 4 hops on"),
    ("latency_back1", "latency_log, mean over 1 hop back"),
    ("latency_back2", "latency_log, mean over 2 hops back"),
    ("latency_back4", "latency_log, mean over 4 hops back"),
    ("latency_tied_on", "latency_log, mean over 1 hop on, weighted by transfer time"),
    ("latency_tied_back", "latency_log, mean over 1 hop back, weighted by transfer time"),
    ("suits_near", "share of the near work ahead that suits the device, times the number of devices, less 1"),
    ("suits_far", "the same of the far work ahead"),
    ("stay_near", "log of the time of the near work ahead here over its time where each op is fastest"),
    ("stay_far", "the same of the far work ahead"),
)
SHARED_MOVING = (
    ("progress", "fraction of the least work decided"),
    ("tail", "least optimistic tail over the horizon"),
    ("balance", "log of horizon over balanced load"),
    ("memory_pressure", "bytes still needed over bytes left; 0 when unlimited"),
    ("link_pressure", "highest link load over balanced load"),
    ("fluid", "log of fluid time over balanced load"),
    ("use", "fraction of the devices' time until the makespan so far that they work"),
    ("traffic", "log(1 + all transfer time so far / work so far)"),
    ("level_done", "fraction of the work at the class's depth that is decided"),
)
PROGRESS, TAIL, BALANCE, MEMORY_PRESSURE, LINK_PRESSURE, FLUID, USE, TRAFFIC, LEVEL_DONE = range(len(SHARED_MOVING))

CLASS_OWN = (
    ("critical", "longest path through the op over the critical path, everything at its fastest"),
    ("weight", "log of mean latency over the mean of all classes"),
    ("out_time", "log(1 + mean transfer time of the outputs / mean latency)"),
    ("in_time", "log(1 + mean transfer time of the inputs / mean latency)"),
    ("fan_out", "log(1 + consumers) / 2"),
    ("fan_in", "log(1 + incoming tensors) / 2"),
    ("runnable", "fraction of devices that can run it"),
    ("width_early", "log(1 + ops that run at its earliest start, devices without number / devices)"),
    ("width_late", "the same at its latest start"),
    ("level_width", "log(1 + classes at its depth / devices)"),
    ("members", "log of the ops that share its device / 4"),
    ("share", "log of its least work over a device's fair share of all"),
    ("need_share", "its bytes over a fair share of all bytes; 0 when unlimited"),
    ("position", "place in the order of decision, 0 to 1"),
)
CLASS_SPREAD = (
    ("weight_on1", "weight, mean over 1 hop on"),
    ("weight_on2", "weight, mean over 2 hops on"),
    ("weight_on4", "weight, mean over 4 hops on"),
    ("weight_back1", "weight, mean over 1 hop back"),
    ("weight_back2", "weight, mean over 2 hops back"),
    ("weight_back4", "weight, mean over 4 hops back"),
    ("out_time_on1", "out_time, mean over 1 hop on"),
    ("out_time_on4", "out_time, mean over 4 hops on"),
    ("out_time_back1", "out_time, mean over 1 hop back"),
    ("out_time_back4", "out_time, mean over 4 hops back"),
    ("critical_on1", "critical, mean over 1 hop on"),
    ("critical_back1", "critical, mean over 1 hop back"),
    ("fan_out_on2", "fan_out, mean over 2 hops on"),
    ("fan_out_on4", "fan_out, mean over 4 hops on"),
    ("need_on1", "log(1 + bytes / mean bytes), mean over 1 hop on; 0 when unlimited"),
    ("need_on4", "the same over 4 hops on"),
)
WHOLE = (
    ("throughput", "1 for the goal throughput"),
    ("blocking", "1 for blocking transfers"),
    ("host", "1 for the route over host memory"),
    ("contention", "1 when a link carries one transfer at a time"),
    ("priority", "1 for the priority queue"),
    ("energy_weight", "w of the objective"),
    ("microbatches", "log2 / 2"),
    ("devices", "log2 / 2"),
    ("classes", "log / 4"),
    ("parallelism", "log of least work over the critical path"),
    ("communication", "log(1 + all mean transfer times / least work)"),
    ("heterogeneity", "slowness of the slowest device"),
    ("fluid_gain", "log of the best single device's time over the fluid time of everything"),
    ("mean_width", "log of ops per depth over devices"),
)
FEATURES = PAIR_MOVING + PAIR_OWN + PAIR_SPREAD + SHARED_MOVING + CLASS_OWN + CLASS_SPREAD + WHOLE
"""(name, meaning) of every feature, in order."""
NUM_FEATURES = len(FEATURES)
NUM_PAIR_MOVING = len(PAIR_MOVING)
NUM_PAIR = NUM_PAIR_MOVING + len(PAIR_OWN) + len(PAIR_SPREAD)
"""Columns that differ by device."""
NUM_SHARED_MOVING = len(SHARED_MOVING)

_FIRST_SPREAD = NUM_PAIR + NUM_SHARED_MOVING + len(CLASS_OWN)
MESSAGE_COLUMNS = (
    *range(NUM_PAIR - len(PAIR_SPREAD), NUM_PAIR),
    *range(_FIRST_SPREAD, _FIRST_SPREAD + len(CLASS_SPREAD)),
)
"""Columns that are propagated over the graph; `PolicyConfig.message_passing` switches them."""
