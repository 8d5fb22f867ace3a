"""What every group costs on every device: measured by running it, estimated where it cannot run, cached, calibrated."""

from autoplace.costs.build import CostReport, build_problem
from autoplace.costs.calibrate import Calibration, calibrate
from autoplace.costs.measure import GroupTimes, profile_groups

__all__ = ["Calibration", "CostReport", "GroupTimes", "build_problem", "calibrate", "profile_groups"]
