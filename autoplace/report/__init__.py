"""What a tuning found, for people: the candidates' table, plots, one HTML file, a Perfetto trace."""

from autoplace.report.explain import explain_plan
from autoplace.report.html import write_report
from autoplace.report.table import candidates_table
from autoplace.report.trace import write_trace

__all__ = ["candidates_table", "explain_plan", "write_report", "write_trace"]
