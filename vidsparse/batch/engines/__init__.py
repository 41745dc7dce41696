"""Engines of `vidsparse batch`, found by their file names; `vidsparse.batch` is their contract."""
