"""The name by which `fastif.report.evaluations` is known."""

from fastif.report.evaluations import Result, as_json, write_evaluations

__all__ = ["Result", "as_json", "write_evaluations"]
