"""``report.html``: one page that explains a release, in a file that needs nothing else.

Facts are read from what train, calibration and export left behind; each section words and draws a
part of them; nothing here measures or decides.
"""

from export.report.facts import Facts, read_facts
from export.report.page import REPORT, write_report

__all__ = ["REPORT", "Facts", "read_facts", "write_report"]
