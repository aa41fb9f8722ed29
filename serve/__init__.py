"""The endpoint on Ray Serve. Imports nothing here on purpose."""
