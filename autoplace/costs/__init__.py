"""What every group costs on every device: measured by running it, estimated where it cannot run, cached."""

from autoplace.costs.build import CostReport, build_problem
from autoplace.costs.measure import GroupTimes, profile_groups

__all__ = ["CostReport", "GroupTimes", "build_problem", "profile_groups"]
