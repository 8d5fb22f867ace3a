"""A slow, plain simulator: dictionaries, lists and one event queue. Follows the rules at the top of `simulate.kernels`.

It shares no code with the kernels. Transfers in flight are events here, where the kernels mostly know arrivals ahead.
"""

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, field

HOST = "host memory"


@dataclass
class Result:
    feasible: bool = True
    makespan: float = math.inf
    period: float = math.inf
    busy: dict = field(default_factory=dict)
    peak: dict = field(default_factory=dict)
    energy: float | None = None
    start: dict = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    objective: float = math.inf
    transfers: list = field(default_factory=list)  # (source node, target node, tensor, start, end)


class Reference:
    """One problem (of one microbatch) and one assignment."""

    def __init__(self, problem, assignment):
        self.problem, self.semantics = problem, problem.semantics
        self.device = [int(d) for d in assignment]
        self.devices = range(problem.num_devices)
        self.ops = range(problem.num_ops)
        graph = problem.graph
        self.consumers, self.size, self.producer = {}, {}, {}
        self.made, self.needs = defaultdict(list), defaultdict(list)
        for t in range(graph.num_tensors):
            self.producer[t] = int(graph.tensor_producer[t])
            self.size[t] = float(graph.tensor_bytes[t])
            self.consumers[t] = [
                int(c) for c in graph.consumers[graph.consumer_offsets[t] : graph.consumer_offsets[t + 1]]
            ]
            self.made[self.producer[t]].append(t)
            for c in self.consumers[t]:
                self.needs[c].append(t)

    # ---- facts -----------------------------------------------------------------------------------------------------

    def latency(self, op):
        return float(self.problem.latency_ms[op, self.device[op]])

    def stays(self, device):
        return self.semantics.route == "host" and self.problem.cluster.devices[device].kind == "cpu"

    def link(self, source, target):
        """The Link between two nodes, or None."""
        cluster = self.problem.cluster
        names = [d.name for d in cluster.devices]
        if HOST not in (source, target):
            return cluster.links.get((names[source], names[target]), cluster.default_link)
        device = target if source == HOST else source
        cpus = [d for d in self.devices if cluster.devices[d].kind == "cpu"]
        near = [c for c in cpus if cluster.devices[c].host == cluster.devices[device].host]
        if not cpus:
            return cluster.default_link
        stage = (near or cpus)[0]
        return self.link(stage, device) if source == HOST else self.link(device, stage)

    def cost(self, source, target, tensor):
        link = self.link(source, target)
        if link is None:
            return math.inf
        if self.size[tensor] == 0:
            return link.latency_ms
        return link.latency_ms + self.size[tensor] * (1.0 / link.bytes_per_ms)

    def targets(self, tensor):
        home = self.device[self.producer[tensor]]
        return sorted({self.device[c] for c in self.consumers[tensor]} - {home})

    def legs(self):
        """All (tensor, source node, target node) that the assignment needs."""
        for tensor in self.consumers:
            home, targets = self.device[self.producer[tensor]], self.targets(tensor)
            if self.semantics.route == "direct":
                yield from ((tensor, home, d) for d in targets)
                continue
            if targets and not self.stays(home):
                yield tensor, home, HOST
            yield from ((tensor, HOST, d) for d in targets if not self.stays(d))

    def possible(self):
        groups = defaultdict(set)
        for op in self.ops:
            if math.isinf(self.latency(op)):
                return False
            if self.problem.graph.colocate[op] >= 0:
                groups[int(self.problem.graph.colocate[op])].add(self.device[op])
        if any(len(found) > 1 for found in groups.values()):
            return False
        return not any(self.link(source, target) is None for _, source, target in self.legs())

    # ---- the schedule ----------------------------------------------------------------------------------------------

    def rank(self, op):
        """Longest path from the start of an op to the end."""
        longest = 0.0
        for tensor in self.made[op]:
            for consumer in self.consumers[tensor]:
                s, d = self.device[op], self.device[consumer]
                path = self.rank(consumer)
                if s != d and self.semantics.route == "direct":
                    path += self.cost(s, d, tensor)
                elif s != d:
                    out = 0.0 if self.stays(s) else self.cost(s, HOST, tensor)
                    path += out + (0.0 if self.stays(d) else self.cost(HOST, d, tensor))
                longest = max(longest, path)
        return self.latency(op) + longest

    def run(self):
        self.result = Result()
        self.events = []  # (time, number, what, arguments)
        self.number = 0
        self.busy = dict.fromkeys(self.devices, 0.0)
        self.held = dict.fromkeys(self.devices, 0.0)
        for op in self.ops:
            self.held[self.device[op]] += float(self.problem.graph.weight_bytes[op])
        self.peak = dict(self.held)
        self.occupied = set()  # devices, and links from host memory
        self.link_free = defaultdict(float)
        self.waiting = []  # (request time, tensor, target): blocking direct transfers
        self.waiting_legs = defaultdict(list)  # device -> [(request time, tensor)]
        self.ready = defaultdict(list)  # device -> [(ready time, op)]
        self.missing = {op: len(self.needs[op]) for op in self.ops}
        self.uses = {op: sum(len(self.consumers[t]) for t in self.made[op]) for op in self.ops}
        for op in self.ops:
            if self.missing[op] == 0:
                self.ready[self.device[op]].append((0.0, op))
        now = 0.0
        self.start_all(now)
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                _, _, what, arguments = heapq.heappop(self.events)
                what(now, *arguments)
            self.start_all(now)
        assert len(self.result.finish) == len(self.ops)
        return max(self.result.finish.values(), default=0.0)

    def at(self, time, what, *arguments):
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what, arguments))

    def start_all(self, now):
        holding = set()
        for entry in sorted(self.waiting):
            _, tensor, d = entry
            s = self.device[self.producer[tensor]]
            if s in self.occupied or d in self.occupied:
                holding |= {s, d}
                continue
            self.waiting.remove(entry)
            self.occupied |= {s, d}
            cost = self.cost(s, d, tensor)
            self.busy[s] += cost
            self.busy[d] += cost
            self.result.transfers.append((s, d, tensor, now, now + cost))
            self.at(now + cost, self.end_blocking, tensor, s, d)
        for d in self.devices:
            self.start_leg(now, d)
            if d not in self.occupied and d not in holding and self.ready[d]:
                self.start_op(now, d)

    def start_leg(self, now, d):
        blocking = self.semantics.transfers == "blocking"
        resource = d if blocking else (HOST, d)
        if resource in self.occupied or not self.waiting_legs[d]:
            return
        entry = min(self.waiting_legs[d])
        self.waiting_legs[d].remove(entry)
        tensor = entry[1]
        outward = self.device[self.producer[tensor]] == d
        cost = self.cost(d, HOST, tensor) if outward else self.cost(HOST, d, tensor)
        self.occupied.add(resource)
        if blocking:
            self.busy[d] += cost
        ends = (d, HOST) if outward else (HOST, d)
        self.result.transfers.append((*ends, tensor, now, now + cost))
        self.at(now + cost, self.end_leg, tensor, d, resource, outward)

    def start_op(self, now, d):
        if self.semantics.queue == "fifo" and self.problem.part is not None:
            entry = min(self.ready[d], key=lambda e: (self.problem.part[e[1]], e[1]))
        elif self.semantics.queue == "fifo":
            entry = min(self.ready[d])
        else:
            entry = min(self.ready[d], key=lambda e: (-self.rank(e[1]), e[1]))
        self.ready[d].remove(entry)
        op = entry[1]
        self.occupied.add(d)
        self.busy[d] += self.latency(op)
        self.held[d] += float(self.problem.graph.activation_bytes[op])
        self.peak[d] = max(self.peak[d], self.held[d])
        self.result.start[op] = now
        self.at(now + self.latency(op), self.end_op, op)

    def end_op(self, now, op):
        self.result.finish[op] = now
        self.occupied.discard(self.device[op])
        for tensor in self.made[op]:
            self.supply(now, tensor, self.device[op])
            self.send(now, tensor)
        for tensor in self.needs[op]:
            producer = self.producer[tensor]
            self.uses[producer] -= 1
            if self.uses[producer] == 0 and self.problem.graph.frees[producer]:
                self.held[self.device[producer]] -= float(self.problem.graph.activation_bytes[producer])

    def end_blocking(self, now, tensor, s, d):
        self.occupied -= {s, d}
        self.supply(now, tensor, d)

    def end_leg(self, now, tensor, d, resource, outward):
        self.occupied.discard(resource)
        if outward:
            self.in_host_memory(now, tensor)
        else:
            self.supply(now, tensor, d)

    def supply(self, now, tensor, d):
        for consumer in self.consumers[tensor]:
            if self.device[consumer] == d:
                self.missing[consumer] -= 1
                if self.missing[consumer] == 0:
                    self.ready[d].append((now, consumer))

    def reserve(self, now, source, target, tensor):
        """End of an overlapped transfer requested now on a link that serves in the order of requests."""
        start = max(now, self.link_free[source, target]) if self.semantics.contention == "link" else now
        end = start + self.cost(source, target, tensor)
        self.link_free[source, target] = end
        self.result.transfers.append((source, target, tensor, start, end))
        return end

    def send(self, now, tensor):
        home, targets = self.device[self.producer[tensor]], self.targets(tensor)
        blocking = self.semantics.transfers == "blocking"
        if not targets:
            return
        if self.semantics.route == "direct":
            for d in targets:
                if blocking:
                    self.waiting.append((now, tensor, d))
                else:
                    self.at(self.reserve(now, home, d, tensor), self.supply, tensor, d)
        elif self.stays(home):
            self.in_host_memory(now, tensor)
        elif blocking:
            self.waiting_legs[home].append((now, tensor))
        else:
            self.at(self.reserve(now, home, HOST, tensor), self.in_host_memory, tensor)

    def in_host_memory(self, now, tensor):
        for d in self.targets(tensor):
            if self.stays(d):
                self.supply(now, tensor, d)
            elif self.semantics.transfers == "blocking" or self.semantics.contention == "link":
                self.waiting_legs[d].append((now, tensor))
            else:
                self.at(self.reserve(now, HOST, d, tensor), self.supply, tensor, d)

    # ---- all figures -----------------------------------------------------------------------------------------------

    def loads(self):
        busy, links = dict.fromkeys(self.devices, 0.0), defaultdict(float)
        for op in self.ops:
            busy[self.device[op]] += self.latency(op)
        for tensor, source, target in self.legs():
            cost = self.cost(source, target, tensor)
            links[source, target] += cost
            if self.semantics.transfers == "blocking":
                for end in (source, target):
                    if end != HOST:
                        busy[end] += cost
        if self.semantics.contention == "link":
            return busy, max([*busy.values(), *links.values()])
        return busy, max(busy.values())

    def evaluate(self):
        devices = self.problem.cluster.devices
        if not self.possible():
            return Result(feasible=False)
        makespan = self.run()
        result = self.result
        result.makespan, result.peak, result.busy = makespan, self.peak, self.busy
        if any(self.peak[d] > devices[d].memory_bytes for d in self.devices):
            return Result(feasible=False, peak=self.peak)
        busy, period = self.loads()
        throughput = self.problem.objective.goal == "throughput"
        result.period = period if throughput else makespan
        if throughput:
            result.busy = busy
        if not any(d.idle_watts is None or d.busy_watts is None for d in devices):
            result.energy = sum(
                d.idle_watts * result.period + (d.busy_watts - d.idle_watts) * result.busy[i]
                for i, d in enumerate(devices)
            ) / 1000.0  # fmt: skip
        result.objective = self.problem.objective.value(result.period, result.energy)
        return result


def evaluate(problem, assignment):
    """All figures of an assignment."""
    return Reference(problem, assignment).evaluate()
