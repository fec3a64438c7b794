"""Where frames come from: files, watched folders, cameras, each behind one small protocol."""

from runtime.sources.opening import open_source

__all__ = ["open_source"]
