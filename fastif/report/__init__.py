"""Reports: what was measured as one HTML page and one JSON file, readable without fastif."""

from fastif.report.class_removal import write_report
from fastif.report.evaluations import write_evaluations
from fastif.report.explanations import explain
from fastif.report.verification import verify_removal

__all__ = ["explain", "verify_removal", "write_evaluations", "write_report"]
