"""Publishing: signed bundles on channels, as plain files that any static web server can serve."""
