"""Where frames come from: files, watched folders, cameras, each behind one small protocol."""
