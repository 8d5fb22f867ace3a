"""From a model to an `OpGraph`: the graph itself, capture and coarsening."""

from autoplace.graph.backward import with_backward
from autoplace.graph.capture import Capture
from autoplace.graph.coarsen import Grouping, group_modules
from autoplace.graph.opgraph import OpGraph

__all__ = ["Capture", "Grouping", "OpGraph", "group_modules", "with_backward"]
