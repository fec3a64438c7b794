"""``report.html``: one page that explains a release, in a file that needs nothing else.

Facts are read from what train, calibration and export left behind; each section words and draws a
part of them; nothing here measures or decides.
"""
