"""The stage set of demo and tests: drawn people in drawn pictures. Imports nothing here on purpose."""
