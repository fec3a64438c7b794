"""A section of the report that is not written yet."""

from export.report.facts import Facts
from export.report.page import Section


def make(facts: Facts) -> Section | None:
    """Nothing yet."""
    return None
