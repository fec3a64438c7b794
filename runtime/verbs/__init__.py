"""The verbs of the device command, one file each: options, what is printed, the exit code."""
