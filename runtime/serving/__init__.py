"""The classifier over HTTP: Open Inference Protocol v2. It never shares a process with a camera."""
