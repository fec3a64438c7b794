"""A page that shows the line: what the loop says each second, and the process that serves it."""
